"""Barriers in shared memory that count arrivals and bytes.

Source: PTX ISA 9.0, section 9.7.13.15, "Parallel Synchronization and Communication Instructions:
mbarrier".
"""

from __future__ import annotations

from dataclasses import dataclass

MARK = 0xB411E2B411E2
# of pending arrivals, and of the bytes still to come
_MOST_ARRIVALS, _MOST_BYTES = 2**20 - 1, 2**20 - 1


class BarrierError(Exception):
    """A use of a barrier that the ISA leaves undefined."""


@dataclass
class Barrier:
    """Phases are numbered from 0; a phase ends when nothing is pending and no byte is missing."""

    expected: int
    pending: int
    missing: int = 0
    phase: int = 0

    def arrive(self, count: int = 1) -> None:
        self.pending -= count
        if self.pending < 0:
            raise BarrierError(f"{-self.pending} arrivals too many in phase {self.phase}")
        self._end_phase()

    def expect(self, size: int) -> None:
        self.missing += size
        self._check_bytes()
        self._end_phase()

    def complete(self, size: int) -> None:
        self.missing -= size
        self._check_bytes()
        self._end_phase()

    def passed(self, parity: int) -> bool:
        """Whether the latest phase of that parity has ended."""
        return self.phase % 2 != parity

    def _check_bytes(self) -> None:
        if abs(self.missing) > _MOST_BYTES:
            raise BarrierError(f"{self.missing} bytes are pending, {_MOST_BYTES} can be counted")

    def _end_phase(self) -> None:
        if self.pending == 0 and self.missing == 0:
            self.phase += 1
            self.pending = self.expected


class Barriers:
    """Those of one block, by their addresses in shared memory."""

    def __init__(self) -> None:
        self._at: dict[int, Barrier] = {}

    def init(self, address: int, count: int) -> None:
        if address % 8:
            raise BarrierError(f"a barrier at {address:#x}, which 8 does not divide")
        if not 0 < count <= _MOST_ARRIVALS:
            raise BarrierError(f"a barrier for {count} arrivals")
        self._at[address] = Barrier(count, count)

    def __getitem__(self, address: int) -> Barrier:
        if address not in self._at:
            raise BarrierError(f"no barrier has been set up at {address:#x}")
        return self._at[address]

    def idle(self) -> bool:
        """Whether no bytes are on their way."""
        return not any(barrier.missing for barrier in self._at.values())
