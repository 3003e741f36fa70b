"""Vector instructions on two numbers at once, and on halves of registers.

Source: "CDNA3 ISA" 6.6 "Packed Math", 12.12 (VOP3P): OP_SEL, OP_SEL_HI, NEG, NEG_HI.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import conversions as convert
from .assembly import Instruction, Unknown
from .operands import Operand, Reader, parse, reader
from .scalar import Step
from .wave import Wave

_PAIRS: dict[str, Callable[..., Any]] = {
    "v_pk_add_f32": lambda a, b: a + b,
    "v_pk_mul_f32": lambda a, b: a * b,
    "v_pk_fma_f32": convert.fma,
}
_MIXED = ("v_fma_mix_f32", "v_fma_mixlo_f16", "v_fma_mixhi_f16")


def build(instruction: Instruction) -> Step | None:
    """What such an instruction does; None where this file does not know it."""
    if instruction.name in _PAIRS:
        return _pair(instruction, _PAIRS[instruction.name])
    if instruction.name == "v_pk_mov_b32":
        return _move(instruction)
    return _mixed(instruction) if instruction.name in _MIXED else None


def _half(text: str, high: int, negative: int = 0) -> Reader:
    """One register of a pair, as fp32."""
    operand = parse(text)
    if operand.negative or operand.absolute or (operand.kind == "constant" and high):
        raise Unknown(f"{text} in packed arithmetic")
    if operand.kind == "constant":
        return reader(text, "f32")
    if operand.width != 2 or operand.kind not in ("v", "s"):
        raise Unknown(f"{text} in packed arithmetic")
    read = _register(operand, high)
    return (lambda w: -read(w)) if negative else read


def _register(operand: Operand, high: int) -> Reader:
    n = operand.index + high
    if operand.kind == "v":
        return lambda w: w.f32[n]
    return lambda w: np.uint32(w.s[n]).view(np.float32)


def _destination(text: str) -> int:
    operand = parse(text)
    if operand.kind != "v" or operand.width != 2:
        raise Unknown(f"{text} for a packed result")
    return operand.index


def _pair(instruction: Instruction, function: Callable[..., Any]) -> Step:
    instruction.allow("op_sel", "op_sel_hi", "neg_lo", "neg_hi")
    n, *texts = _destination(instruction.operands[0]), *instruction.operands[1:]
    chosen = [
        (instruction.bits("op_sel", 0), instruction.bits("neg_lo", 0)),
        (instruction.bits("op_sel_hi", 1), instruction.bits("neg_hi", 0)),
    ]
    low, high = (
        [_half(text, select[i], negative[i]) for i, text in enumerate(texts)]
        for select, negative in chosen
    )

    def step(w: Wave) -> None:
        results = function(*(read(w) for read in low)), function(*(read(w) for read in high))
        w.put(w.f32[n], results[0])
        w.put(w.f32[n + 1], results[1])

    return step


def _move(instruction: Instruction) -> Step:
    """Either register of the first pair, and either of the second."""
    instruction.allow("op_sel")
    n, select = _destination(instruction.operands[0]), instruction.bits("op_sel", 0)
    low, high = (_half(text, select[i]) for i, text in enumerate(instruction.operands[1:]))

    def step(w: Wave) -> None:
        a, b = np.copy(low(w)), np.copy(high(w))
        w.put(w.u32[n], a.view(np.uint32))
        w.put(w.u32[n + 1], b.view(np.uint32))

    return step


def _mixed(instruction: Instruction) -> Step:
    """A fused product of fp32 numbers and halves, which OP_SEL_HI and OP_SEL tell apart."""
    instruction.allow("op_sel", "op_sel_hi")
    is_half, high = instruction.bits("op_sel_hi", 0), instruction.bits("op_sel", 0)
    sources = [
        _number(text, is_half[i], high[i]) for i, text in enumerate(instruction.operands[1:])
    ]
    result = parse(instruction.operands[0])
    if result.kind != "v" or result.width != 1 or len(sources) != 3:
        raise Unknown(instruction.text)
    n, name = result.index, instruction.name

    def step(w: Wave) -> None:
        total = convert.fma(*(read(w) for read in sources))
        if name == "v_fma_mix_f32":
            w.put(w.f32[n], total)
        elif name == "v_fma_mixlo_f16":
            w.put(w.u32[n], w.u32[n] & np.uint32(0xFFFF0000) | convert.to_f16(total))
        else:
            kept = w.u32[n] & np.uint32(0xFFFF)
            w.put(w.u32[n], kept | convert.to_f16(total) << np.uint32(16))

    return step


def _number(text: str, is_half: int, high: int) -> Reader:
    if not is_half:
        if high:
            raise Unknown(f"op_sel of {text}, an fp32 number")
        return reader(text, "f32")
    operand = parse(text)
    if operand.kind == "constant" or operand.negative or operand.absolute:
        raise Unknown(f"{text} as fp16")
    read, shift = reader(text, "u32"), np.uint32(16 * high)
    return lambda w: convert.from_f16(read(w) >> shift)
