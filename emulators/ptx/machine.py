"""Blocks of a grid, one after the other, each with its warps in some order.

A warp runs until it can go no further, then another does: who reads what another warp has not yet
written, for lack of a barrier, finds poison or old values.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .frame import WARP, Frame
from .memory import Memory, Region
from .parse import Entry, Refused
from .program import SHARED_BASE, Program, program
from .races import Watch
from .registers import Array

Order = Literal["ascending", "descending", "random"]


@dataclass
class Barrier:
    """Source: PTX ISA, "bar, barrier": opens when as many threads as it expects have come."""

    arrived: int = 0
    expected: int = 0
    opened: int = 0  # how often

    def arrive(self, threads: int, expected: int) -> None:
        if self.arrived and self.expected != expected:
            raise Refused(f"a barrier of {self.expected} threads and of {expected}")
        self.arrived, self.expected = self.arrived + threads, expected
        if self.arrived > expected:
            raise Refused(f"{self.arrived} threads at a barrier of {expected}")
        if self.arrived == expected:
            self.arrived, self.opened = 0, self.opened + 1


@dataclass
class Block:
    """What the threads of a block share.

    Attributes:
        pending: What runs on by itself. Whatever is in it is done, in this order, only when no
            warp can go on: as late as it may be.
        state: Of instructions that need more than this, by a name of theirs.
    """

    index: tuple[int, int, int]
    threads: int
    memory: Memory
    shared: Region
    parameters: Region
    barriers: dict[int, Barrier] = field(default_factory=dict)
    pending: list[Callable[[], None]] = field(default_factory=list)
    state: dict[str, object] = field(default_factory=dict)

    def barrier(self, number: int) -> Barrier:
        if not 0 <= number < 16:
            raise Refused(f"there are 16 barriers; this is number {number}")
        return self.barriers.setdefault(number, Barrier())

    def ordered(self, threads: int) -> None:
        """As many have met: what all of them did before comes before what they do now."""
        if self.shared.watch is None:
            return
        if threads != self.threads:
            raise Refused(f"races are not looked for across a barrier of {threads} threads")
        self.shared.watch.epoch += 1


class Machine:
    """Runs a kernel.

    Args:
        order: In which warps are taken up.
        together: How many warps run in lockstep; 0 is all of them.
        seed: Of the random order.
        races: Whether to look for races: between warps in shared memory, for kernels in which
            nothing but barriers of all threads orders what they do there, and between blocks in
            the tensors that are written.
    """

    def __init__(
        self,
        memory: Memory,
        order: Order = "ascending",
        together: int = 1,
        seed: int = 0,
        races: bool = False,
    ) -> None:
        if races and together != 1:
            raise ValueError(f"warps must run one by one to find races, not {together} together")
        self.memory, self.order, self.together, self.races = memory, order, together, races
        self._random, self._launches = random.Random(seed), 0
        for region in memory.regions if races else ():
            if region.writable:
                region.watch = Watch(region.name, region.size, "block", unit=1)

    def launch(
        self,
        entry: Entry,
        arguments: Sequence[bytes],
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
    ) -> None:
        """Run every block of a grid; blocks are one-dimensional.

        Args:
            arguments: The bytes of each parameter.
            shared_bytes: Dynamic shared memory of a block.

        Raises:
            Refused: the kernel does what it may not, or what is not known here.
        """
        if entry.max_threads is not None and threads > entry.max_threads:
            raise Refused(f"{threads} threads, {entry.name} takes {entry.max_threads}")
        if threads % WARP:
            raise Refused(f"{threads} threads are no whole warps")
        self._launches += 1
        made = program(entry)
        parameters = Region("parameters", 0, _parameters(made, arguments), writable=False)
        width = (self.together or threads // WARP) * WARP
        frames = made.frames(threads, width)
        size = made.code.shared_bytes + shared_bytes
        for number, index in enumerate(itertools.product(*map(range, reversed(grid)))):
            data = np.full(-(-size // 8), -1, np.int64).view(np.uint8)[:size]  # poison: NaN
            shared = Region("shared memory", SHARED_BASE, data)
            if self.races:
                shared.watch = Watch(shared.name, size, "warp", unit=2)
            self.memory.turn(number, self._launches)
            block = Block(index[::-1], threads, self.memory, shared, parameters)
            self._run(block, frames, grid)

    def _run(self, block: Block, frames: list[Frame], grid: tuple[int, int, int]) -> None:
        special = {"%tid.y": 0, "%tid.z": 0, "%ntid.x": block.threads, "%ntid.y": 1, "%ntid.z": 1}
        for name, index, size in zip("xyz", block.index, grid, strict=True):
            special |= {f"%ctaid.{name}": index, f"%nctaid.{name}": size}
        for frame in frames:
            frame.start(block, special)
        with np.errstate(all="ignore"):
            while any(frame.alive.any() for frame in frames):
                ran = [frame.run() for frame in self._in_order(frames)]
                if any(ran):
                    continue
                if not block.pending:
                    places = "\n".join(frame.places() for frame in frames)
                    raise Refused(f"no thread of block {block.index} can go on:\n{places}")
                block.pending.pop(0)()
            for action in block.pending:
                action()

    def _in_order(self, frames: list[Frame]) -> list[Frame]:
        if self.order == "ascending":
            return frames
        if self.order == "descending":
            return frames[::-1]
        return self._random.sample(frames, len(frames))


def _parameters(made: Program, arguments: Sequence[bytes]) -> Array:
    places = list(made.code.parameters.values())
    sizes = [variable.size for variable in made.entry.parameters]
    if [len(argument) for argument in arguments] != sizes:
        raise Refused(f"arguments of {[*map(len, arguments)]} bytes, wanted are {sizes}")
    data = np.zeros(-(-made.code.parameter_bytes // 8), np.int64).view(np.uint8)
    for at, argument in zip(places, arguments, strict=True):
        data[at : at + len(argument)] = np.frombuffer(argument, np.uint8)
    return data
