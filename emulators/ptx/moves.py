"""Copies and conversions between registers.

Source: PTX ISA, "Data Movement and Conversion Instructions": mov, cvt, cvta.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .floats import flush
from .integers import BITS, INTEGERS, compute
from .memory import PARAM_WINDOW, SHARED_WINDOW
from .parse import Instruction, Sink, Vector
from .registers import TYPES, Array
from .table import Step, instruction

if TYPE_CHECKING:
    from .frame import Frame
    from .program import Code


@instruction("mov")
def move(code: Code, i: Instruction) -> Step:
    """mov: also of an address, or between one register and the vector of its parts."""
    kind = i.parts[-1]
    if len(i.parts) != 2 or kind not in (*BITS, *INTEGERS, "f32", "f64", "pred"):
        raise i.refuse("modifier not known")
    if isinstance(i.operands[0], Vector):
        return _unpack(code, i, kind)
    if isinstance(i.operands[1], Vector):
        return _pack(code, i, kind)
    d, a = code.write(i.operands[0], kind, i), code.read(i.operands[1], kind, i)

    def step(f: Frame) -> None:
        np.copyto(f.v[d], f.v[a], where=f.mask)

    return step


def _part(i: Instruction, kind: str, count: int) -> str:
    bits = 8 * TYPES[kind].itemsize
    if kind[0] != "b" or bits % count or f"b{bits // count}" not in TYPES:
        raise i.refuse("parts of a register")
    return f"b{bits // count}"


def _unpack(code: Code, i: Instruction, kind: str) -> Step:
    assert isinstance(i.operands[0], Vector)
    parts = i.operands[0].parts
    part = _part(i, kind, len(parts))
    slots = [None if isinstance(p, Sink) else code.write(p, part, i) for p in parts]
    a = code.read(i.operands[1], kind, i)

    def step(f: Frame) -> None:
        whole = f.v[a].copy().view(TYPES[part]).reshape(f.threads, -1)
        for n, slot in enumerate(slots):
            f.put(slot, whole[:, n])

    return step


def _pack(code: Code, i: Instruction, kind: str) -> Step:
    assert isinstance(i.operands[1], Vector)
    part = _part(i, kind, len(i.operands[1].parts))
    d = code.write(i.operands[0], kind, i)
    slots = [code.read(operand, part, i) for operand in i.operands[1].parts]

    def step(f: Frame) -> None:
        whole = np.stack([f.v[slot] for slot in slots], 1)
        f.put(d, whole.view(TYPES[kind])[:, 0])

    return step


@instruction("prmt")
def permute(code: Code, i: Instruction) -> Step:
    """PTX ISA, "prmt", its default mode: each nibble of c picks one of the eight bytes of {b, a}.

    Its upper bit asks for the byte's sign instead.
    """
    if i.parts != ("prmt", "b32"):
        raise i.refuse("modifier not known")

    def pick(a: Array, b: Array, c: Array) -> Array:
        both = b.astype(np.uint64) << 32 | a
        result = np.zeros_like(a)
        for n in range(4):
            nibble = (c >> 4 * n).astype(np.uint64) & 15
            byte = (both >> 8 * (nibble & 7) & 255).astype(np.uint32)
            sign = np.where(byte & 128, 255, 0).astype(np.uint32)
            result |= np.where(nibble & 8, sign, byte) << 8 * n
        return result

    return compute(code, i, "b32", ["b32", "b32", "b32"], pick)


@instruction("cvta")
def convert_address(code: Code, i: Instruction) -> Step:
    """cvta, cvta.to: between the addresses of a space and generic ones."""
    back = i.parts[1:2] == ("to",)
    space, kind = i.parts[1 + back :] if len(i.parts) == 3 + back else ("", "")
    window = {"global": 0, "shared": SHARED_WINDOW, "param": PARAM_WINDOW}.get(space)
    if window is None or kind != "u64":
        raise i.refuse("modifier not known")
    by = np.uint64(window)
    return compute(code, i, kind, [kind], lambda a: a - by if back else a + by)


# -- conversions


def to_bfloat16(x: Array) -> Array:
    """Bits of fp32 rounded to nearest even; any NaN becomes 0x7FFF."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_float16(x: Array) -> Array:
    """Bits of fp16 rounded to nearest even; any NaN becomes 0x7FFF."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def to_tf32(x: Array) -> Array:
    """``.rna``: 10 bits of the fraction are kept, halves go away from zero."""
    bits = x.astype(np.float32).view(np.uint32)
    return np.where(np.isfinite(x), (bits + 0x1000) & 0xFFFFE000, bits)


_HALVES: dict[str, Callable[[Array], Array]] = {"f16": to_float16, "bf16": to_bfloat16}


@instruction("cvt")
def convert(code: Code, i: Instruction) -> Step:
    """cvt[.rounding][.ftz].to.from; of two numbers for a pair, the first in the upper half."""
    if len(i.parts) < 3 or i.parts[-1] not in TYPES:
        raise i.refuse("modifier not known")
    *flags, to, source = i.parts[1:]
    if to in ("f16x2", "bf16x2"):
        return _convert_pair(code, i, flags, to, source)
    if to == "tf32":
        if flags != ["rna"] or source != "f32":
            raise i.refuse("conversion not known")
        return compute(code, i, "b32", ["f32"], to_tf32)
    function = _conversion(i, tuple(flags), to, source)
    d, a = code.extend(i.operands[0], to, i), code.read_low(i.operands[1], source, i)
    return lambda f: f.put(d, function(f.v[a]))


def _convert_pair(code: Code, i: Instruction, flags: list[str], to: str, source: str) -> Step:
    if flags != ["rn"] or source != "f32":
        raise i.refuse("conversion not known")
    narrow = _HALVES[to.removesuffix("x2")]

    def pair(upper: Array, lower: Array) -> Array:
        return narrow(upper).astype(np.uint32) << 16 | narrow(lower)

    return compute(code, i, "b32", ["f32", "f32"], pair)


def _conversion(
    i: Instruction, flags: tuple[str, ...], to: str, source: str
) -> Callable[[Array], Array]:
    dtype: Any = TYPES.get(to)
    if to in INTEGERS and source in INTEGERS and not flags:
        return lambda a: a.astype(dtype)  # cut off, or extended as the source is signed
    if to in ("f16", "bf16") and source == "f32" and flags == ("rn",):
        half = np.dtype(np.float16) if to == "f16" else np.dtype(np.uint16)
        return lambda a: _HALVES[to](a).view(half)
    if to == "f32" and source == "f16" and not flags:
        return lambda a: a.astype(np.float32)
    if to == "f32" and source == "bf16" and not flags:
        return from_bfloat16
    if to == "f64" and source == "f32" and not flags:
        return lambda a: a.astype(np.float64)
    if to == "f32" and source == "f64" and set(flags) in ({"rn"}, {"rn", "ftz"}):
        ftz = "ftz" in flags
        return lambda a: flush(a.astype(dtype)) if ftz else a.astype(dtype)
    if to in ("f32", "f64") and source in INTEGERS and flags == ("rn",):
        return lambda a: a.astype(dtype)
    if to in INTEGERS and source in ("f32", "f64") and flags in (("rzi",), ("rni",)):
        return _to_integer(dtype, np.trunc if flags == ("rzi",) else np.rint)
    raise i.refuse("conversion not known")


def _to_integer(dtype: Any, round_: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Out of range is the nearest integer that there is, NaN is 0."""
    range_ = np.iinfo(dtype)
    if range_.bits == 64:
        low, high = float(range_.min), np.nextafter(float(range_.max), 0)
    else:
        low, high = float(range_.min), float(range_.max)

    def convert_to_integer(a: Array) -> Array:
        whole = round_(a.astype(np.float64))
        return np.clip(np.nan_to_num(whole, posinf=high, neginf=low), low, high).astype(dtype)

    return convert_to_integer
