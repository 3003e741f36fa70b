"""Warps that run in lockstep, and what becomes of them where their threads part.

Source: PTX ISA, "Independent Thread Scheduling": threads of a warp may part and meet again. Here
those that are furthest behind run first, so that threads meet at the earliest instruction that
both will come to; what a warp does as one waits for all its threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .parse import Refused
from .registers import Array, RegisterFile
from .table import RESCHEDULE

if TYPE_CHECKING:
    from .machine import Block
    from .program import Program

WARP = 32
_NOWHERE = -2
_JUMPS = 20_000_000  # of a frame; more is a loop without end
Mask = Literal[True] | Array
Condition = Callable[[], bool]


class Frame:
    """Some warps of a block.

    Attributes:
        v: One array of a value for each thread, by slot.
        mask: The threads that run now: True is all of them.
        active: How many these are.
        pc: Number of the instruction that they run.
        block: What the threads share.
        first: Number in the block of the first thread.
    """

    def __init__(self, program: Program, first: int, threads: int) -> None:
        self.program, self.first, self.threads = program, first, threads
        self._file = RegisterFile(program.registers, threads)
        self.v = self._file.arrays
        self.lanes = np.arange(first, first + threads) % WARP
        self.block: Block = None  # type: ignore[assignment]

    def start(self, block: Block, special: dict[str, Any]) -> None:
        own = {
            "%tid.x": np.arange(self.first, self.first + self.threads),
            "%laneid": self.lanes,
            "%warpid": np.arange(self.first, self.first + self.threads) // WARP,
            "%lanemask_lt": (1 << self.lanes) - 1,
        }
        self._file.reset(special | own)
        self.block = block
        self.at = np.zeros(self.threads, np.int64)
        self.alive = np.ones(self.threads, np.bool_)
        self._meeting = np.zeros(self.threads, np.bool_)
        self._waiting: list[tuple[Array, Condition, int]] = []
        self._jumps = 0

    # -- who runs

    def set_mask(self, mask: Mask) -> None:
        self.mask: Mask = mask
        self.active = self.threads if mask is True else self.count_of(mask)
        if self.active == self.threads:
            self.mask = True

    @staticmethod
    def count_of(mask: Array) -> int:
        return int(np.count_nonzero(mask))

    def where(self) -> Array:
        """The mask as an array."""
        return np.ones(self.threads, np.bool_) if self.mask is True else self.mask

    def only(self, values: Array) -> Array:
        """Of an array with one entry a thread, the entries of threads that run now."""
        return values if self.mask is True else values[self.mask]

    def put(self, slot: int | None, values: Array) -> None:
        """Write a register; ``values`` has an entry for each thread."""
        if slot is not None:
            np.copyto(self.v[slot], values, where=self.mask, casting="unsafe")

    def put_only(self, slot: int | None, values: Array) -> None:
        """Write a register; ``values`` has an entry for each thread that runs now."""
        if slot is None:
            return
        if self.mask is True:
            np.copyto(self.v[slot], values, casting="unsafe")
        else:
            self.v[slot][self.mask] = values

    def has_whole_warps(self) -> bool:
        if self.mask is True:
            return True
        warps = self.mask.reshape(-1, WARP)
        return bool((warps.all(1) == warps.any(1)).all())

    def warps(self) -> Array:
        """Of which warps all threads run now."""
        return self.where().reshape(-1, WARP).all(1)

    # -- ends of a step

    def split(self, before: Mask, taken: Array, jump: int) -> None:
        """Of the threads ``before``, those ``taken`` jump and the others go on."""
        others = ~taken if before is True else before & ~taken
        self.at[others] = self.pc + 1
        if jump != RESCHEDULE:
            self.at[taken] = jump

    def leave(self) -> int:
        """These threads have ended."""
        self.alive[self.mask] = False
        return RESCHEDULE

    def meet(self) -> int:
        """These threads come here again when more of their warps are there."""
        if self._last_chance:
            raise Refused("threads of one warp are not together")
        self.at[self.mask] = self.pc
        self._meeting |= self.mask
        return RESCHEDULE

    def wait(self, ready: Condition, then: int) -> int:
        """These threads go on with instruction ``then`` once it is ready."""
        self.at[self.mask] = then
        self._waiting.append((self.where().copy(), ready, self.pc))
        return RESCHEDULE

    # -- running

    def run(self) -> bool:
        """Go on as far as possible; False where no thread could take a step."""
        ran, watch = False, self.block.shared.watch
        if watch is not None:
            watch.who = self.first // WARP
        while self._choose():
            ran = True
            try:
                self._go()
            except Refused as refused:
                raise Refused(f"{refused}\n{self.describe()}") from None
        return ran

    def _choose(self) -> bool:
        if not self.alive.any():
            return False
        ready = self.alive.copy()
        self._waiting = [waiting for waiting in self._waiting if not waiting[1]()]
        for who, _, _ in self._waiting:
            ready &= ~who
        free = ready & ~self._meeting
        self._last_chance = False
        if not free.any():
            if self._waiting or not ready.any():
                return False
            self._last_chance, free = True, ready
        self.pc = int(self.at[free].min())
        chosen = ready & (self.at == self.pc)
        self._meeting &= ~chosen
        ahead = self.at[self.alive & (self.at > self.pc)]
        self._stop = int(ahead.min()) if ahead.size else _NOWHERE
        self.set_mask(chosen)
        return True

    def _go(self) -> None:
        steps, stop, pc = self.program.steps, self._stop, self.pc
        while True:
            self.pc = pc
            jump = steps[pc](self)
            if jump is None:
                pc += 1
            elif jump == RESCHEDULE:
                return
            else:
                pc = jump
                self._jumps += 1
                if self._jumps > _JUMPS:
                    raise Refused("a loop without end")
            if pc == stop:
                self.at[self.mask] = pc
                return

    def describe(self) -> str:
        """Where it is, for messages."""
        i = self.program.instruction(self.pc)
        lines = [f"  at {self.pc}: {i}", f"  in {self.program.entry.name}"]
        lines.append(f"  block {self.block.index}, {self._names(self.where())}")
        return "\n".join(lines)

    def places(self) -> str:
        """Where its threads wait, for messages."""
        lines, others = [], self.alive.copy()
        for who, _, pc in self._waiting:
            lines.append(f"  {self._names(who)} wait at {pc}: {self.program.instruction(pc)}")
            others &= ~who
        for pc in np.unique(self.at[others]).tolist():
            who = self._names(others & (self.at == pc))
            lines.append(f"  {who} at {pc}: {self.program.instruction(pc)}")
        return "\n".join(lines)

    def _names(self, who: Array) -> str:
        return f"threads {_runs((self.first + np.flatnonzero(who)).tolist())}"


def _runs(numbers: list[int]) -> str:
    """1-3, 7"""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
