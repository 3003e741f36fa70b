"""Arithmetic that is no operator of numpy: fused products, divisions in steps, conversions.

Denormals are kept, as the kernels' mode has it, where the instruction can.

Source: "CDNA3 ISA" 12.8 "VOP1 Instructions", 12.10-12.11 (VOP3).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from .assembly import Unknown

_TINY = np.finfo(np.float32).tiny


def fma(a: Any, b: Any, c: Any) -> Any:
    """a b + c. By fp64, and so rounded twice: apart from fused in the last bit once in 2^29."""
    wide = np.float64
    return (wide(a) * wide(b) + wide(c)).astype(np.float32)


def flush(x: Any) -> Any:
    """Denormals to 0 of their sign."""
    return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)


def mad(a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded after each, without denormals."""
    return flush(flush(flush(a) * flush(b)) + flush(c))


def _exact(a: float, b: float, c: float) -> float:
    if not np.isfinite([a, b, c]).all():
        return a * b + c
    total = Fraction(a) * Fraction(b) + Fraction(c)
    return float(total) if total else a * b + c


def fma_f64(a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once."""
    numbers = np.stack(np.broadcast_arrays(a, b, c), -1).reshape(-1, 3)
    distinct, which = np.unique(numbers.view(np.uint64), axis=0, return_inverse=True)
    results = np.array([_exact(*row) for row in distinct.view(np.float64).tolist()])
    return results[which.reshape(-1)].reshape(np.broadcast_shapes(*map(np.shape, (a, b, c))))


def exp2(a: Any) -> Any:
    """Within a bit; without denormals."""
    return flush(np.exp2(np.float64(flush(a))).astype(np.float32))


def log2(a: Any) -> Any:
    return np.log2(np.float64(flush(a))).astype(np.float32)


def rough_reciprocal(a: Any) -> Any:
    """1 / a, as little exact as an fp64 one is promised to be: 2^29 units of its last place."""
    bits = np.asarray(1.0 / a).view(np.uint64)
    return (bits & ~np.uint64((1 << 28) - 1)).view(np.float64)


def scale_f32(a: Any, exponent: Any) -> Any:
    return np.ldexp(np.float64(a), exponent).astype(np.float32)


def leading_zeros(a: Any) -> Any:
    """Of the highest one, counted from the top; all ones where there is none."""
    _, exponent = np.frexp(np.float64(a))
    return np.where(a == 0, -1, 32 - exponent).astype(np.int32).view(np.uint32)


def reversed_bits(a: Any) -> Any:
    bits = np.unpackbits(np.atleast_1d(a).view(np.uint8), bitorder="little")
    return np.packbits(bits.reshape(-1, 32)[:, ::-1].copy(), bitorder="little").view(np.uint32)


def permuted_bytes(high: Any, low: Any, select: Any) -> Any:
    """Each byte one of the 8 that ``select`` says, or 0."""
    high, low, select = np.broadcast_arrays(high, low, select)
    given = np.stack([low, high, np.zeros_like(low)], -1).view(np.uint8)
    which = np.ascontiguousarray(select)[:, None].view(np.uint8)
    if not ((which < 8) | (which == 0x0C)).all():
        raise Unknown(f"bytes {which.max():#x} of v_perm_b32")
    return np.take_along_axis(given, np.minimum(which, 8), -1).view(np.uint32)[:, 0]


def to_u32(a: Any) -> Any:
    """Towards 0, at the bounds outside; NaN is 0."""
    inside = np.clip(np.nan_to_num(np.float64(a), nan=0.0, posinf=2.0**33), 0, 2**32 - 1)
    return np.trunc(inside).astype(np.uint32)


def to_f16(a: Any) -> Any:
    """In the lower half; the upper half becomes 0."""
    return a.astype(np.float16).view(np.uint16).astype(np.uint32)


def from_f16(a: Any) -> Any:
    return (a & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16).astype(np.float32)


def _exponent(a: Any) -> Any:
    """With its bias, as it is stored."""
    fraction, integer = (23, np.uint32) if a.dtype == np.float32 else (52, np.uint64)
    return (np.abs(a).view(integer) >> integer(fraction)).astype(np.int64)


def div_scale(s0: Any, s1: Any, s2: Any) -> tuple[Any, Any]:
    """s0, scaled such that s2 / s1 can be found by Newton's steps; whether div_fmas scales back."""
    s0, s1, s2 = np.broadcast_arrays(s0, s1, s2)
    # how far it is scaled; exponents: of a large quotient, of a tiny numerator
    scale, large, tiny = (64, 96, 23) if s0.dtype == np.float32 else (128, 768, 53)
    up, down = np.ldexp(s0, scale), np.ldexp(s0, -scale)
    small_quotient, small_reciprocal = _is_denormal(s2 / s1), _is_denormal(1 / np.float64(s1))
    only_denominator = np.where(s0 == s1, up, s0)
    cases = [
        ((s1 == 0) | (s2 == 0), np.full_like(s0, np.nan), False),
        (_exponent(s2) - _exponent(s1) >= large, only_denominator, True),
        (_is_denormal(s1), up, False),
        (small_reciprocal & small_quotient, only_denominator, True),
        (small_reciprocal, down, False),
        (small_quotient, np.where(s0 == s2, up, s0), True),
        (_exponent(s2) <= tiny, up, False),
    ]
    which, values, back = zip(*cases, strict=True)
    return np.select(which, values, s0), np.select(which, [np.array(x) for x in back], False)


def _is_denormal(a: Any) -> Any:
    return (a != 0) & (np.abs(a) < np.finfo(a.dtype).tiny)


def div_fixup(quotient: Any, denominator: Any, numerator: Any) -> Any:
    """The quotient with its sign, or what IEEE says of zeros, infinities and NaN."""
    quotient, denominator, numerator = np.broadcast_arrays(quotient, denominator, numerator)
    sign = np.signbit(denominator) ^ np.signbit(numerator)
    exact = numerator / denominator
    special = ~np.isfinite(exact) & ~(np.isfinite(numerator) & (denominator != 0))
    special |= (denominator == 0) | (numerator == 0) | np.isinf(denominator)
    magnitude = np.where(special, np.abs(exact), np.abs(quotient))
    return np.where(np.isnan(exact) & special, exact, np.where(sign, -magnitude, magnitude))
