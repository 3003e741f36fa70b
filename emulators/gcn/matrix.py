"""Matrix products: D = A B + C over all lanes of a wave, active or not.

Layouts as AMD's "Matrix Instruction Calculator" prints them, with 4 numbers of 16 bits in two
registers of A and of B:
- A[i][k] in lane i + M (k / 4), number k % 4; B[k][j] in lane j + N (k / 4), number k % 4;
- C and D[i][j] in register i % 4 + 4 (i / (256 / M)), lane j + N (i / 4 % (64 / M)).

Source: "CDNA3 ISA" 7 "Matrix Arithmetic Instructions"; gfx90a takes denormals for 0: "CDNA2 ISA" 7,
PyTorch, "Numerical Accuracy".
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .assembly import Instruction, Unknown
from .operands import parse
from .scalar import Step
from .wave import LANES, Wave

_NAME = re.compile(r"v_mfma_f32_(16x16x16|32x32x8)_?(f16|bf16(?:_1k)?)$")
_SIZES = {"16x16x16": (16, 16), "32x32x8": (32, 8)}
_TINY = {"f16": np.float32(2.0**-14), "bf16": np.finfo(np.float32).tiny}


def build(instruction: Instruction) -> Step | None:
    """What a matrix instruction does; None where it is another."""
    if not instruction.name.startswith("v_mfma"):
        return None
    found = _NAME.match(instruction.name)
    if found is None:
        raise Unknown(instruction.text)
    instruction.allow()
    rows, depth = _SIZES[found[1]]
    kind = found[2].removesuffix("_1k")
    d, a, b, c = instruction.operands
    count = rows * rows // LANES
    put, left, right = _registers(d, count), _registers(a, 2), _registers(b, 2)
    zero = c == "0"
    before = put if zero else _registers(c, count)

    def step(w: Wave) -> None:
        x = operand(w.u32[left : left + 2], kind, rows, depth)
        y = operand(w.u32[right : right + 2], kind, rows, depth)
        total = np.float64(0) if zero else accumulator(w.f32[before : before + count], rows)
        if w.flushes_denormals:
            x, y = (np.where(np.abs(m) < _TINY[kind], 0, m) for m in (x, y))
        total = (total + x.astype(np.float64) @ y.astype(np.float64).T).astype(np.float32)
        if w.flushes_denormals:
            total = np.where(np.abs(total) < _TINY["bf16"], np.float32(0), total)
        for register, values in zip(w.f32[put : put + count], spread(total), strict=True):
            register[:] = values

    return step


def _registers(text: str, count: int) -> int:
    operand = parse(text)
    if operand.kind != "v" or operand.width != count or operand.negative:
        raise Unknown(f"{text} for {count} registers of a matrix")
    return operand.index


def operand(registers: list[NDArray[np.uint32]], kind: str, rows: int, depth: int) -> Any:
    """(rows, depth) fp32: A, or the transpose of B."""
    bits = np.ascontiguousarray(np.stack(registers, -1)).view(np.uint16)
    if kind == "f16":
        numbers = bits.view(np.float16).astype(np.float32)
    else:
        numbers = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return numbers.reshape(depth // 4, rows, 4).transpose(1, 0, 2).reshape(rows, depth)


def accumulator(registers: list[NDArray[np.float32]], rows: int) -> NDArray[np.float64]:
    """(rows, rows) of C."""
    parts = np.stack(registers).reshape(-1, 4, LANES // rows, rows)
    return parts.transpose(0, 2, 1, 3).reshape(rows, rows).astype(np.float64)


def spread(d: NDArray[np.float32]) -> NDArray[np.float32]:
    """(registers, lanes) of D."""
    rows = len(d)
    parts = d.reshape(-1, LANES // rows, 4, rows)
    return parts.transpose(0, 2, 1, 3).reshape(-1, LANES)
