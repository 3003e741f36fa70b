"""What an instruction names: registers and constants, read and written under a type.

Source: "CDNA3 ISA" 5.2 "Scalar ALU Operands", 6.2 "Operands".
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .assembly import Instruction, Unknown
from .wave import FIRST_AGPR, FIRST_VECTOR, M0, VCC, Wave

Reader = Callable[[Wave], Any]
Writer = Callable[[Wave, Any], None]

_REGISTER = re.compile(r"([vsa])(?:(\d+)|\[(\d+):(\d+)\])$")
_NAMED = {"vcc": (VCC, 2), "vcc_lo": (VCC, 1), "vcc_hi": (VCC + 1, 1), "m0": (M0, 1)}
_INTEGER = re.compile(r"-?\d+$|0x[0-9a-f]+$")
_FLOAT = re.compile(r"-?\d+\.\d+$")
TYPES = {
    "u32": np.uint32,
    "i32": np.int32,
    "f32": np.float32,
    "u64": np.uint64,
    "i64": np.int64,
    "f64": np.float64,
}


@dataclass(frozen=True)
class Operand:
    """A register, a constant, or EXEC.

    Attributes:
        kind: "v" (AGPRs too, from 256 on), "s", "exec" or "constant".
        width: Registers.
        value: Of a constant.
    """

    kind: str
    index: int = 0
    width: int = 1
    value: int | float = 0
    negative: bool = False
    absolute: bool = False

    @property
    def registers(self) -> frozenset[int]:
        if self.kind not in ("v", "s"):
            return frozenset()
        first = self.index + (FIRST_VECTOR if self.kind == "v" else 0)
        return frozenset(range(first, first + self.width))


@functools.cache
def parse(text: str) -> Operand:
    negative = text.startswith("-") and not _INTEGER.match(text) and not _FLOAT.match(text)
    bare = text[1:] if negative else text
    absolute = bare.startswith("|") and bare.endswith("|")
    bare = bare.strip("|")
    if text == "neg(0)":
        return Operand("constant", value=-0.0)
    register = _REGISTER.match(bare)
    if register is not None:
        first = int(register[2] or register[3])
        width = 1 if register[2] else int(register[4]) - first + 1
        if register[1] == "s":
            return Operand("s", first, width, 0, negative, absolute)
        first += FIRST_AGPR if register[1] == "a" else 0
        return Operand("v", first, width, 0, negative, absolute)
    if bare in _NAMED:
        return Operand("s", *_NAMED[bare], 0, negative, absolute)
    if bare == "exec":
        return Operand("exec", 0, 2)
    if _INTEGER.match(bare):
        return Operand("constant", value=int(bare, 0), negative=negative)
    if _FLOAT.match(bare):
        return Operand("constant", value=float(bare), negative=negative, absolute=absolute)
    raise Unknown(f"operand {text!r}")


def registers_of(instruction: Instruction, skip: int = 0) -> frozenset[int]:
    """Every register that an instruction names, but in the first operands."""
    found: frozenset[int] = frozenset()
    for text in instruction.operands[skip:]:
        if text not in ("off", "") and not text.startswith((".L", "vmcnt", "lgkmcnt")):
            found |= parse(text).registers
    return found


def constant(operand: Operand, kind: str) -> Any:
    """Of 64 bits: inline integers are extended by their sign, others refused."""
    value = operand.value
    if isinstance(value, float):
        if kind[0] == "f":
            return TYPES[kind](value)
        return np.float32(value).view(np.uint32).astype(TYPES[kind])
    if (kind == "f64" and value != 0) or (kind[1:] == "64" and not -16 <= value <= 64):
        raise Unknown(f"{value} as {kind}")
    if kind == "f64":
        return np.float64(0)
    if kind[1:] == "64":
        return np.int64(value).astype(TYPES[kind])
    return np.array(value & 0xFFFFFFFF, np.uint32).view(TYPES[kind])[()]


def reader(text: str, kind: str) -> Reader:
    """Of one of TYPES: by lane, or one number for all of them."""
    operand = parse(text)
    read = _plain_reader(operand, kind)
    if not operand.negative and not operand.absolute:
        return read
    if kind[0] != "f":
        raise Unknown(f"{text} as {kind}")
    if operand.absolute:
        return (lambda w: -np.abs(read(w))) if operand.negative else lambda w: np.abs(read(w))
    return lambda w: -read(w)


def _plain_reader(operand: Operand, kind: str) -> Reader:
    if operand.kind == "constant":
        value = constant(operand, kind)
        return lambda w: value
    wide = kind[1:] == "64"
    if operand.kind == "exec" or operand.width != (2 if wide else 1):
        raise Unknown(f"{operand} as {kind}")
    n, number = operand.index, TYPES[kind]
    if operand.kind == "s":
        if wide:
            return lambda w: np.uint64(w.pair(n)).view(number)
        return lambda w: np.uint32(w.s[n]).view(number)
    if wide:
        return lambda w: _join(w, n).view(number)
    if kind == "u32":
        return lambda w: w.u32[n]
    if kind == "i32":
        return lambda w: w.i32[n]
    return lambda w: w.f32[n]


def _join(w: Wave, n: int) -> Any:
    return w.u32[n].astype(np.uint64) | w.u32[n + 1].astype(np.uint64) << np.uint64(32)


def writer(text: str, kind: str) -> Writer:
    """Into the active lanes of a vector register or two."""
    operand = parse(text)
    wide = kind[1:] == "64"
    if operand.kind != "v" or operand.width != (2 if wide else 1):
        raise Unknown(f"{text} for a result of {kind}")
    n = operand.index
    if kind == "u32":
        return lambda w, x: w.put(w.u32[n], x)
    if kind == "i32":
        return lambda w, x: w.put(w.i32[n], x)
    if kind == "f32":
        return lambda w, x: w.put(w.f32[n], x)

    def put(w: Wave, x: Any) -> None:
        bits = x.view(np.uint64)
        w.put(w.u32[n], bits.astype(np.uint32))
        w.put(w.u32[n + 1], (bits >> np.uint64(32)).astype(np.uint32))

    return put


def scalar_reader(text: str, bits: int) -> Callable[[Wave], int]:
    """An unsigned integer. Constants of 64 bits: inline by sign, literals from 32 bits by zeros."""
    operand = parse(text)
    if operand.negative or operand.absolute:
        raise Unknown(f"{text} in scalar arithmetic")
    if operand.kind == "constant":
        given = operand.value
        if isinstance(given, float) and bits != 32:
            raise Unknown(f"{text} as a scalar of {bits} bits")
        whole = int(np.float32(given).view(np.uint32)) if isinstance(given, float) else given
        value = whole & ((1 << bits) - 1)
        return lambda w: value
    if operand.kind == "v" or operand.width * 32 != bits:
        raise Unknown(f"{text} as a scalar of {bits} bits")
    n = operand.index
    if operand.kind == "exec":
        return lambda w: w.exec
    return (lambda w: w.s[n]) if bits == 32 else lambda w: w.pair(n)


def scalar_writer(text: str, bits: int) -> Callable[[Wave, int], None]:
    operand = parse(text)
    if operand.kind not in ("s", "exec") or operand.width * 32 != bits:
        raise Unknown(f"{text} for a scalar of {bits} bits")
    n = operand.index
    if operand.kind == "exec":
        return lambda w, x: setattr(w, "exec", x & (1 << 64) - 1)

    def put(w: Wave, x: int) -> None:
        w.s[n] = x & 0xFFFFFFFF

    return put if bits == 32 else lambda w, x: w.set_pair(n, x)
