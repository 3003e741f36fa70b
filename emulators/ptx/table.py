"""The table of instructions: who makes what runs for an opcode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .parse import Instruction

if TYPE_CHECKING:
    from .frame import Frame
    from .program import Code

# Runs an instruction for the threads in `frame.mask`. Returns None to go on with the next one, the
# number of another, or RESCHEDULE once it has written where each of these threads is to go on.
Step = Callable[["Frame"], int | None]
Maker = Callable[["Code", Instruction], Step]
RESCHEDULE = -1

_MAKERS: dict[str, Maker] = {}


def instruction(*names: str, whole_warps: bool = False) -> Callable[[Maker], Maker]:
    """Register what makes the step of opcodes that begin with one of the names.

    The longest name that fits decides. A maker must look at every modifier of the opcode and
    refuse what it does not know.

    Args:
        whole_warps: The instruction's threads wait until their whole warp is there.
    """

    def register(make: Maker) -> Maker:
        def make_together(code: Code, i: Instruction) -> Step:
            return _together(make(code, i))

        for name in names:
            assert name not in _MAKERS, name
            _MAKERS[name] = make_together if whole_warps else make
        return make

    return register


def maker(i: Instruction) -> Maker:
    parts = i.parts
    for length in range(len(parts), 0, -1):
        found = _MAKERS.get(".".join(parts[:length]))
        if found is not None:
            return found
    raise i.refuse("instruction not known")


def _together(step: Step) -> Step:
    def together(f: Frame) -> int | None:
        return step(f) if f.has_whole_warps() else f.meet()

    return together


def guarded(step: Step, predicate: int, negated: bool) -> Step:
    """PTX ISA, "Predicated Execution": only threads whose predicate is true (or false) run it."""

    def run(f: Frame) -> int | None:
        taken = ~f.v[predicate] if negated else f.v[predicate]
        before = f.mask
        if before is not True:
            taken = taken & before
        count = f.count_of(taken)
        if count == 0:
            return None
        if count == f.active:
            return step(f)
        f.set_mask(taken.copy())
        jump = step(f)
        if jump is None:
            f.set_mask(before)
            return None
        f.split(before, taken, jump)
        return RESCHEDULE

    return run
