"""A lane's own memory, for what does not fit into its registers.

Source: "CDNA3 ISA" 9.4 "Scratch"; gfx942 has its place in hardware, set up by no register.
"""

from __future__ import annotations

import re

import numpy as np

from .assembly import Instruction, Unknown
from .scalar import Step
from .transfers import SIZES, get_bytes, put_bytes, vectors
from .wave import Hazard, Wave

_NAME = re.compile(r"scratch_(load|store)_(dword(?:x[234])?)$")


def build(instruction: Instruction) -> Step | None:
    """What such an instruction does; None where this file does not know it."""
    found = _NAME.match(instruction.name)
    if found is None:
        return None
    instruction.allow("offset")
    loads, size = found[1] == "load", SIZES[found[2]]
    first, second, third = instruction.operands
    data, at = (first, second) if loads else (second, first)
    if (at, third) != ("off", "off"):
        raise Unknown(instruction.text)
    registers, offset = vectors(data, size), instruction.number("offset")
    n, place = registers.index, slice(offset, offset + size)

    def step(w: Wave) -> None:
        if offset < 0 or offset + size > w.scratch.shape[1]:
            raise Hazard(f"touches {size} bytes at {offset} of {w.scratch.shape[1]} of its own")
        lanes = np.flatnonzero(w.mask)
        if loads:
            w.transfer(
                w.vector_transfers,
                registers.registers,
                lambda: put_bytes(w, n, lanes, w.scratch[lanes, place].copy()),
            )
            return
        content = get_bytes(w, n, lanes, size)

        def land() -> None:
            w.scratch[lanes, place] = content

        w.transfer(w.vector_transfers, frozenset(), land)

    return step
