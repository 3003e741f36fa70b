"""Vector instructions that choose among lanes, and those with a second result.

Source: "CDNA3 ISA" 12.8 (V_READFIRSTLANE), 12.11 (V_CNDMASK, V_READLANE, V_WRITELANE, V_MAD_U64,
V_DIV_SCALE, V_DIV_FMAS).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import conversions as convert
from .assembly import Instruction, Unknown
from .operands import parse, reader, scalar_reader, scalar_writer, writer
from .scalar import Step
from .wave import LANES, VCC, Wave, bits_of, mask_of


def build(instruction: Instruction) -> Step | None:
    """What such an instruction does; None where this file does not know it."""
    made = _BUILDERS.get(instruction.name)
    if made is None or instruction.encoding == "sdwa":  # of which vector.py knows some
        return None
    instruction.allow()
    return made(instruction.operands)  # type: ignore[no-any-return]


def _choose(operands: tuple[str, ...]) -> Step:
    """The second source where the mask has a 1."""
    put, mask = writer(operands[0], "u32"), scalar_reader(operands[3], 64)
    a, b = (reader(x, "u32") for x in operands[1:3])
    return lambda w: put(w, np.where(mask_of(mask(w)), b(w), a(w)))


def _vector(text: str) -> int:
    operand = parse(text)
    if operand.kind != "v" or operand.width != 1:
        raise Unknown(f"{text} for a vector register")
    return operand.index


def _read_first_lane(operands: tuple[str, ...]) -> Step:
    """The lowest active lane, the first where none is."""
    put, n = scalar_writer(operands[0], 32), _vector(operands[1])
    return lambda w: put(w, int(w.u32[n][(w.exec & -w.exec).bit_length() - 1 if w.exec else 0]))


def _read_lane(operands: tuple[str, ...]) -> Step:
    put, n = scalar_writer(operands[0], 32), _vector(operands[1])
    lane = scalar_reader(operands[2], 32)
    return lambda w: put(w, int(w.u32[n][lane(w) % LANES]))


def _write_lane(operands: tuple[str, ...]) -> Step:
    n, value, lane = _vector(operands[0]), *(scalar_reader(x, 32) for x in operands[1:])

    def step(w: Wave) -> None:
        w.u32[n][lane(w) % LANES] = value(w)

    return step


def _multiply_add(operands: tuple[str, ...]) -> Step:
    """32 x 32 + 64 bits, and the carry out of them."""
    put, put_carry = writer(operands[0], "u64"), scalar_writer(operands[1], 64)
    a, b, c = (reader(x, kind) for x, kind in zip(operands[2:], ("u32", "u32", "u64"), strict=True))

    def step(w: Wave) -> None:
        product = a(w).astype(np.uint64) * b(w).astype(np.uint64)
        total = product + c(w)
        put(w, total)
        put_carry(w, bits_of((total < product) & w.mask))

    return step


def _multiply_add_signed(operands: tuple[str, ...]) -> Step:
    """32 x 32 + 64 bits, and bit 64 of their sum: its sign."""
    put, put_sign = writer(operands[0], "i64"), scalar_writer(operands[1], 64)
    a, b, c = (reader(x, kind) for x, kind in zip(operands[2:], ("i32", "i32", "i64"), strict=True))

    def step(w: Wave) -> None:
        product, more = a(w).astype(np.int64) * b(w).astype(np.int64), c(w)
        total = product + more
        overflows = ((product < 0) == (more < 0)) & ((product < 0) != (total < 0))
        put(w, total)
        put_sign(w, bits_of(((total < 0) ^ overflows) & w.mask))

    return step


def _div_scale(kind: str) -> Any:
    def build_it(operands: tuple[str, ...]) -> Step:
        put, put_back = writer(operands[0], kind), scalar_writer(operands[1], 64)
        sources = [reader(x, kind) for x in operands[2:]]

        def step(w: Wave) -> None:
            scaled, back = convert.div_scale(*(read(w) for read in sources))
            put(w, scaled)
            put_back(w, bits_of(back & w.mask))

        return step

    return build_it


def _div_fmas(kind: str) -> Any:
    """A fused product, unless VCC says that it is scaled.

    By how much the documents leave in doubt: by 2^32, of what v_div_scale has scaled by 2^64.
    """
    fma = convert.fma if kind == "f32" else convert.fma_f64

    def build_it(operands: tuple[str, ...]) -> Step:
        put, sources = writer(operands[0], kind), [reader(x, kind) for x in operands[1:]]

        def step(w: Wave) -> None:
            if w.pair(VCC) & w.exec:
                raise Unknown("v_div_fmas of a division that v_div_scale has scaled")
            put(w, fma(*(read(w) for read in sources)))

        return step

    return build_it


_BUILDERS: dict[str, Any] = {
    "v_cndmask_b32": _choose,
    "v_readfirstlane_b32": _read_first_lane,
    "v_readlane_b32": _read_lane,
    "v_writelane_b32": _write_lane,
    "v_mad_u64_u32": _multiply_add,
    "v_mad_i64_i32": _multiply_add_signed,
    "v_div_scale_f32": _div_scale("f32"),
    "v_div_scale_f64": _div_scale("f64"),
    "v_div_fmas_f32": _div_fmas("f32"),
    "v_div_fmas_f64": _div_fmas("f64"),
}
