"""Loads and stores by way of a buffer resource, as Triton's compiler writes them.

Raw buffers alone: a lane whose offset is not below the number of bytes reads 0 and writes nothing.

Source: "CDNA3 ISA" 9.1.5 "Buffer Addressing", "Range Checking", 9.1.8 "Buffer Resource".
"""

from __future__ import annotations

import re

import numpy as np

from .assembly import Instruction, Unknown
from .operands import parse, reader, scalar_reader
from .scalar import Step
from .transfers import SIZES, get_bytes, put_bytes, vectors
from .wave import Wave

_NAME = re.compile(r"buffer_(load|store)_(ubyte|byte|ushort|short|dword(?:x[234])?)$")


def build(instruction: Instruction) -> Step | None:
    """What such an instruction does; None where this file does not know it."""
    found = _NAME.match(instruction.name)
    if found is None:
        return None
    instruction.allow("offen", "offset")
    data, at, resource, more = instruction.operands
    if "offen" not in instruction.modifiers or parse(resource).width != 4:
        raise Unknown(instruction.text)
    size, first = SIZES[found[2]], parse(resource).index
    registers, address, scalar = vectors(data, size), reader(at, "u32"), scalar_reader(more, 32)
    n, offset = registers.index, instruction.number("offset")

    def step(w: Wave) -> None:
        base, count = resource_of(w, first)
        offsets = address(w).astype(np.int64) + offset
        inside = w.mask & (offsets + scalar(w) + size <= count)
        if (w.mask & ~inside & (offsets + scalar(w) < count)).any():
            raise Unknown("a number on the edge of a buffer")
        lanes, outside = np.flatnonzero(inside), np.flatnonzero(w.mask & ~inside)
        places = offsets[lanes] + (base + scalar(w))
        if found[1] == "store":
            content = get_bytes(w, n, lanes, size)
            w.transfer(w.vector_transfers, frozenset(), lambda: w.memory.write(places, content))
            return

        def land() -> None:
            put_bytes(w, n, lanes, w.memory.read(places, size))
            put_bytes(w, n, outside, np.zeros((len(outside), size), np.uint8))

        w.transfer(w.vector_transfers, registers.registers, land)

    return step


def resource_of(w: Wave, first: int) -> tuple[int, int]:
    """Address and bytes of a raw buffer."""
    low, high, count, _ = w.s[first : first + 4]
    stride, swizzles = high >> 16 & 0x3FFF, high >> 30
    if stride or swizzles:
        raise Unknown(f"a buffer of stride {stride}, swizzle bits {swizzles}")
    return low | (high & 0xFFFF) << 32, count
