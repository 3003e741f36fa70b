"""Where a thread goes next, and where it waits for others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .parse import Immediate, Instruction, Refused
from .table import Step, instruction

if TYPE_CHECKING:
    from .frame import Frame
    from .program import Code


@instruction("bra")
def branch(code: Code, i: Instruction) -> Step:
    """PTX ISA, "bra". ``.uni`` promises that no warp parts here, which is checked."""
    target = code.label(i.operands[0], i)
    if i.parts[1:] == ("uni",) and i.guard is not None:
        raise i.refuse("a branch with .uni and a predicate")
    if i.parts[1:] not in ((), ("uni",)):
        raise i.refuse("modifier not known")
    return lambda f: target


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
