"""One wave: its registers, and what it has asked of memory and not yet got.

Sources: "CDNA3 ISA" 3 "Kernel State" and 4.4 "Manually Inserted Wait States" with "S_WAITCNT".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .memory import Lds, Memory

LANES = 64
ALL = (1 << LANES) - 1
VCC, M0 = 106, 124  # among the scalar registers
FIRST_VECTOR = 1000  # names a vector register where both kinds are named by one number
FIRST_AGPR = 256  # among the vector registers: architectural ones first
_POISON = 0x7FC5A5A5  # a NaN, and a large integer


class Hazard(AssertionError):
    """The program reads or writes what is still under way, or leaves its bounds."""


@dataclass(eq=False)
class Transfer:
    """A load or store under way."""

    scalar: bool
    registers: frozenset[int]
    land: Callable[[], None]


@dataclass
class Wave:
    """64 lanes.

    Attributes:
        late: Whether transfers happen at the s_waitcnt that awaits them, or at once. Their
            registers are out of bounds until then either way.
        u32, i32, f32: The vector registers, by lane, under three types; AGPRs from 256 on.
        s: The scalar registers, of 32 bits.
        mask: EXEC by lane; ``full`` where it is all ones.
    """

    memory: Memory
    lds: Lds
    late: bool
    flushes_denormals: bool = False
    scratch_bytes: int = 0
    pc: int = 0
    scc: int = 0
    s: list[int] = field(default_factory=lambda: [_POISON] * 128)
    pending: set[int] = field(default_factory=set)
    vector_transfers: deque[Transfer] = field(default_factory=deque)
    local_transfers: deque[Transfer] = field(default_factory=deque)

    def __post_init__(self) -> None:
        registers = np.full((2 * FIRST_AGPR, LANES), _POISON, np.uint32)
        self.u32: list[NDArray[np.uint32]] = list(registers)
        self.i32: list[NDArray[np.int32]] = list(registers.view(np.int32))
        self.f32: list[NDArray[np.float32]] = list(registers.view(np.float32))
        self.scratch = np.full((LANES, self.scratch_bytes), 0xFF, np.uint8)
        self.exec = ALL

    @property
    def exec(self) -> int:
        return self._exec

    @exec.setter
    def exec(self, value: int) -> None:
        self._exec = value
        self.full = value == ALL
        self.mask = mask_of(value)

    def pair(self, index: int) -> int:
        return self.s[index] | self.s[index + 1] << 32

    def set_pair(self, index: int, value: int) -> None:
        self.s[index], self.s[index + 1] = value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF

    def put(self, register: NDArray[np.generic], value: object) -> None:
        """Into the active lanes."""
        if self.full:
            register[...] = value
        else:
            np.copyto(register, value, where=self.mask, casting="same_kind")  # type: ignore[arg-type]

    def transfer(
        self,
        queue: deque[Transfer],
        registers: frozenset[int],
        land: Callable[[], None],
        *,
        scalar: bool = False,
    ) -> None:
        """Ask for something. Two answers for one register come in order only from one queue."""
        other = self.local_transfers if queue is self.vector_transfers else self.vector_transfers
        others = [*other, *(t for t in queue if scalar or t.scalar)]
        if any(registers & t.registers for t in others):
            raise Hazard("loads what is still under way, and may come later than that")
        if not self.late:
            land()
            land = _nothing
        queue.append(Transfer(scalar, registers, land))
        self.pending |= registers

    def await_vector(self, left: int) -> None:
        """Until so many are under way: vector memory answers in order."""
        while len(self.vector_transfers) > left:
            self._land(self.vector_transfers, self.vector_transfers[0])

    def await_local(self, left: int) -> None:
        """LDS answers in order, scalar memory in any: only a 0 says that it has."""
        queue = self.local_transfers
        landed = [t for t in queue if not t.scalar]
        landed = landed[: max(0, len(landed) - left)] if left else list(queue)
        for transfer in landed:
            self._land(queue, transfer)

    def _land(self, queue: deque[Transfer], transfer: Transfer) -> None:
        queue.remove(transfer)
        transfer.land()
        self.pending.difference_update(transfer.registers)
        for other in queue:
            self.pending |= other.registers


def mask_of(bits: int) -> NDArray[np.bool_]:
    packed = np.frombuffer(bits.to_bytes(8, "little"), np.uint8)
    return np.unpackbits(packed, bitorder="little").view(np.bool_)


def bits_of(mask: NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little")


def _nothing() -> None:
    pass
