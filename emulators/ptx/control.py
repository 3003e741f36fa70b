"""Where a thread goes next, and where it waits for others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .parse import Immediate, Instruction, Refused, Symbol
from .table import RESCHEDULE, Step, instruction

if TYPE_CHECKING:
    from .frame import Frame
    from .program import Code


@instruction("bra")
def branch(code: Code, i: Instruction) -> Step:
    """PTX ISA, "bra". ``.uni`` promises that no warp parts here, which is checked."""
    target = code.label(i.operands[0], i)
    if i.parts[1:] not in ((), ("uni",)):
        raise i.refuse("modifier not known")
    if i.parts[1:] == () or i.guard is None:
        return lambda f: target

    def whole_warps(f: Frame) -> int:
        if not f.has_whole_warps():
            raise i.refuse("a warp parts")
        return target

    return whole_warps


@instruction("brx.idx")
def branch_by_table(code: Code, i: Instruction) -> Step:
    """PTX ISA, "brx.idx": to the label of that number in a list of .branchtargets."""
    if i.parts[2:] not in ((), ("uni",)):
        raise i.refuse("modifier not known")
    number, table = code.read(i.operands[0], "u32", i), code.label(i.operands[1], i)
    targets = [code.label(Symbol(name), i) for name in code.body.tables[table]]

    def step(f: Frame) -> int:
        chosen = f.v[number]
        if int(f.only(chosen).max()) >= len(targets):
            raise Refused(f"branch {int(f.only(chosen).max())} of {len(targets)}")
        for n in np.unique(f.only(chosen)).tolist():
            f.at[f.where() & (chosen == n)] = targets[n]
        return RESCHEDULE

    return step


@instruction("ret", "exit")
def end(code: Code, i: Instruction) -> Step:
    """PTX ISA, "ret" and "exit": from an entry both end the thread."""
    if len(i.parts) > 1:
        raise i.refuse("modifier not known")
    return lambda f: f.leave()


@instruction("bar.sync", "barrier.sync", "barrier.sync.aligned", whole_warps=True)
def barrier(code: Code, i: Instruction) -> Step:
    """PTX ISA, "bar, barrier": wait for all threads of the block, or for as many as are told.

    Writes before it are seen after it by all who took part.
    """
    if i.opcode not in ("bar.sync", "barrier.sync", "barrier.sync.aligned"):
        raise i.refuse("modifier not known")
    number, *count = (code.read(operand, "u32", i) for operand in i.operands)

    def step(f: Frame) -> int | None:
        expected = _same(f, count[0]) if count else f.block.threads
        if expected % 32:
            raise Refused(f"a barrier of {expected} threads, which are no whole warps")
        barrier = f.block.barrier(_same(f, number))
        opened = barrier.opened
        barrier.arrive(f.active, expected)
        if barrier.opened > opened:
            f.block.ordered(expected)
            return None
        return f.wait(lambda: barrier.opened > opened, then=f.pc + 1)

    return step


@instruction("bar.warp.sync", whole_warps=True)
def barrier_of_warp(code: Code, i: Instruction) -> Step:
    """PTX ISA, "bar.warp.sync", for masks of whole warps."""
    if i.operands != (Immediate("-1"),) or len(i.parts) != 3:
        raise i.refuse("threads of a mask")
    return lambda f: None


def _same(f: Frame, slot: int) -> int:
    values = np.unique(f.only(f.v[slot]))
    if len(values) != 1:
        raise Refused(f"threads disagree about an operand: {values.tolist()}")
    return int(values[0])
