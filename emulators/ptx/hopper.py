"""Runs kernels of sm_90a, for which ``copies`` and ``products`` fill the table, too.

Source: PTX ISA 9.0, sections 9.7.13.4, "fence", 9.7.13.10, "elect.sync", 9.7.19.5,
"setmaxnreg", and 9.7.14.5.16, "stmatrix".
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
from .parse import Entry, Immediate, Instruction, Pair, Refused, Vector
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


@instruction("stmatrix.sync.aligned.m8n8", whole_warps=True)
def store_matrices(code: Code, i: Instruction) -> Step:
    """stmatrix: what ldmatrix reads, the other way round: 8x8 matrices of 16 bits.

    Lane 4 r + c has elements (r, 2c) and (r, 2c + 1) of each, with .trans (2c, r), (2c + 1, r);
    lanes 8m to 8m + 7 say where the rows of matrix m go.
    """
    counts = {"x1": 1, "x2": 2, "x4": 4}
    size, *rest = i.parts[4:]
    transposed = rest[0] == "trans"
    space, kind = rest[1:] if transposed else rest
    values = cast(Vector, i.operands[1]).parts
    if space not in ("shared", "shared::cta") or kind != "b16" or counts.get(size) != len(values):
        raise i.refuse("modifier not known")
    slots, address = [code.read(part, "b32", i) for part in values], code.address(i.operands[0], i)

    def step(f: Frame) -> None:
        held = np.stack([f.only(f.v[slot]) for slot in slots], 1).reshape(-1, WARP, len(slots))
        matrices = np.ascontiguousarray(held.swapaxes(1, 2)).view("<u2")
        matrices = matrices.reshape(-1, len(slots), 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        rows = address(f).reshape(-1, WARP)[:, : 8 * len(slots)].reshape(-1)
        words = matrices.view("<u4").reshape(-1, 4)
        f.block.shared.write(rows, [np.ascontiguousarray(words[:, n]) for n in range(4)])

    return step
