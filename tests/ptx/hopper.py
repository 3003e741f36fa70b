"""Runs kernels of sm_90a, for which ``copies`` and ``products`` fill the table, too.

Source: PTX ISA 9.0, sections 9.7.13.4, "fence", 9.7.13.10, "elect.sync", and 9.7.19.5,
"setmaxnreg".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from . import copies, products  # noqa: F401  (fill the table)
from .asynchronous import Asynchronous, SharedMemory, asynchronous
from .frame import WARP, Frame
from .machine import Block, Machine
from .memory import Memory
from .parse import Entry, Immediate, Instruction, Pair, Refused
from .table import Step, instruction

if TYPE_CHECKING:
    from .program import Code

_REGISTERS = 65536  # of a multiprocessor


class HopperMachine(Machine):
    """
    Args:
        late_copies, late_products: As in ``Asynchronous``.
        rest: Of ``Machine``; ``together`` is 1, 2 or 4 warps where kernels use wgmma.
    """

    def __init__(
        self,
        memory: Memory,
        late_copies: bool = True,
        late_products: bool = True,
        together: int = 4,
        **rest: Any,
    ) -> None:
        super().__init__(memory, together=together, **rest)
        self._late = late_copies, late_products

    def _run(self, block: Block, frames: list[Frame], grid: tuple[int, int, int]) -> None:
        warps = block.threads // WARP
        owned = dict.fromkeys(range(warps), _registers(frames[0].program.entry, block.threads))
        block.shared = self._shared = SharedMemory(block.shared)
        state = Asynchronous(*self._late, self._shared, owned)
        block.state["asynchronous"] = state
        super()._run(block, frames, grid)
        if not state.barriers.idle():
            raise Refused(f"block {block.index} ended while a barrier waits for bytes")
        products.check_end(state.products)

    def _in_order(self, frames: list[Frame]) -> Iterator[Frame]:
        """Tells the shared memory whose turn it is."""
        for frame in super()._in_order(frames):
            self._shared.who = frame.first // WARP + 1
            yield frame


def _registers(entry: Entry, threads: int) -> int:
    """Of a thread at the start: as .maxnreg has it, or as many as are there for each."""
    found = re.search(r"\.maxnreg\s+(\d+)", entry.header)
    return int(found[1]) if found else min(255, _REGISTERS // threads // 8 * 8)


# -- one thread of a warp


@instruction("elect.sync", whole_warps=True)
def elect(code: Code, i: Instruction) -> Step:
    """The first thread of each warp; the others are told its lane."""
    pair, mask = i.operands
    if i.parts != ("elect", "sync") or mask != Immediate("-1") or not isinstance(pair, Pair):
        raise i.refuse("form not known")
    lane = code.extend(pair.first, "b32", i)
    chosen = code.write(pair.second, "pred", i)

    def step(f: Frame) -> None:
        f.put(lane, np.zeros(f.threads, np.uint32))
        f.put(chosen, f.lanes == 0)

    return step


@instruction("setmaxnreg", whole_warps=True)
def change_registers(code: Code, i: Instruction) -> Step:
    """Gives registers back, or waits until there are enough."""
    grows = i.parts[1] == "inc"
    if i.parts[1:] not in (("inc", "sync", "aligned", "u32"), ("dec", "sync", "aligned", "u32")):
        raise i.refuse("modifier not known")
    (operand,) = i.operands
    wanted = int(cast(Immediate, operand).text)
    if wanted % 8 or not 24 <= wanted <= 256:
        raise i.refuse("a number of registers that is not allowed")

    def step(f: Frame) -> int | None:
        state = asynchronous(f.block)
        warps = [f.first // 32 + int(n) for n in np.flatnonzero(f.warps())]
        owned = {state.owned[warp] for warp in warps}
        if any(before > wanted if grows else before < wanted for before in owned):
            raise Refused(f"from {owned} registers to {wanted}")
        needed = sum(32 * (wanted - state.owned[warp]) for warp in warps)
        if needed > state.free:
            return f.wait(lambda: needed <= state.free, then=f.pc)
        state.free -= needed
        state.owned |= dict.fromkeys(warps, wanted)
        return None

    return step


@instruction("fence.proxy.async")
def fence_proxies(code: Code, i: Instruction) -> Step:
    """Generic accesses before it come before asynchronous ones behind it."""
    if i.parts[3:] not in ((), ("shared::cta",)):
        raise i.refuse("modifier not known")

    def step(f: Frame) -> None:
        asynchronous(f.block).shared.fence()

    return step
