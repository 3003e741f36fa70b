"""Data-parallel primitives: the first source comes from another lane.

A row is 16 lanes, a bank 4 of them. Where there is no source, or an inactive one, a 0 is taken
with BOUND_CTRL, else nothing is written.

Source: "CDNA3 ISA" 6.4 "DPP", 12.15 "DPP".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .assembly import Instruction, Unknown
from .operands import parse, reader
from .scalar import Step
from .wave import LANES, Wave

_LANE = np.arange(LANES)
_ROW, _PLACE = _LANE // 16, _LANE % 16
_NOWHERE = -1


def source_lanes(instruction: Instruction) -> NDArray[np.int64]:
    """For each lane the one that it takes, or -1."""
    given = instruction.modifiers
    if "quad_perm" in given:
        order = np.array([int(x) for x in given["quad_perm"].strip("[]").split(",")])
        return _LANE // 4 * 4 + order[_LANE % 4]
    if "row_mirror" in given:
        return _ROW * 16 + 15 - _PLACE
    if "row_half_mirror" in given:
        return _LANE // 8 * 8 + 7 - _LANE % 8
    if "row_ror" in given:
        return _ROW * 16 + (_PLACE - instruction.number("row_ror")) % 16
    if "row_shr" in given or "row_shl" in given:
        there = _PLACE + instruction.number("row_shl") - instruction.number("row_shr")
        return np.where((there >= 0) & (there < 16), _ROW * 16 + there, _NOWHERE)
    if given.get("row_bcast") == "15":  # the last of each row to the next
        return np.where(_ROW > 0, _ROW * 16 - 1, _NOWHERE)
    if given.get("row_bcast") == "31":  # the middle one to the upper half
        return np.where(_LANE > 31, 31, _NOWHERE)
    raise Unknown(instruction.text)


_CONTROLS = (
    *("quad_perm", "row_mirror", "row_half_mirror"),
    *("row_ror", "row_shr", "row_shl", "row_bcast"),
)


def build(instruction: Instruction, kinds: list[str], function: Callable[..., Any]) -> Step:
    instruction.allow(*_CONTROLS, "row_mask", "bank_mask", "bound_ctrl")
    source, zeros = source_lanes(instruction), instruction.number("bound_ctrl") == 1
    rows, banks = (int(instruction.modifiers[name], 0) for name in ("row_mask", "bank_mask"))
    enabled = ((rows >> _ROW) & (banks >> _PLACE // 4) & 1).astype(np.bool_)
    operand, result = parse(instruction.operands[1]), parse(instruction.operands[0])
    if operand.kind != "v" or operand.negative or operand.absolute or result.width != 1:
        raise Unknown(instruction.text)
    first, *rest = (reader(x, k) for x, k in zip(instruction.operands[1:], kinds, strict=True))
    n = result.index

    def step(w: Wave) -> None:
        there = (source != _NOWHERE) & w.mask[source]
        moved = np.where(there, first(w)[source], first(w).dtype.type(0))
        written = w.mask & enabled & (there | zeros)
        values = function(moved, *(read(w) for read in rest))
        np.copyto(w.u32[n], values.view(np.uint32), where=written)

    return step
