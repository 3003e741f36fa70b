"""Floating point.

Source: PTX ISA, "Floating Point Instructions". Results of ``.approx`` are those of fp64 rounded
once, which is closer than any GPU promises; fused products and sums are rounded by way of fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .integers import (
    add_integers,
    compute,
    divide_integers,
    multiply_integers,
    negate_integers,
    order_integers,
)
from .parse import Instruction
from .registers import Array, is_float
from .table import Maker, Step, instruction

if TYPE_CHECKING:
    from .program import Code

_SMALLEST_NORMAL = np.float32(2.0**-126)


def flush(x: Array) -> Array:
    """``.ftz``: subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def _modifiers(i: Instruction, *known: str) -> tuple[set[str], str]:
    *flags, kind = i.parts[1:]
    if kind not in ("f32", "f64") or not set(flags) <= set(known) or len(set(flags)) < len(flags):
        raise i.refuse("modifier not known")
    if kind == "f64" and "ftz" in flags:
        raise i.refuse(".ftz is for f32")
    return set(flags), kind


def _flushing(function: Callable[..., Array], flags: set[str]) -> Callable[..., Array]:
    if "ftz" not in flags:
        return function
    return lambda *sources: flush(function(*map(flush, sources)))


_TWO: dict[str, Any] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _sum_or_product(code: Code, i: Instruction) -> Step:
    """add, sub, mul: rounded to nearest even."""
    flags, kind = _modifiers(i, "rn", "ftz")
    return compute(code, i, kind, [kind, kind], _flushing(_TWO[i.parts[0]], flags))


def _quotient(code: Code, i: Instruction) -> Step:
    """div.rn, div.full, div.approx."""
    flags, kind = _modifiers(i, "rn", "full", "approx", "ftz")
    if len(flags & {"rn", "full", "approx"}) != 1:
        raise i.refuse("no rounding")
    return compute(code, i, kind, [kind, kind], _flushing(np.divide, flags))


def _extreme(code: Code, i: Instruction) -> Step:
    """min, max: of a NaN and a number, the number. The sign of a zero is numpy's."""
    flags, kind = _modifiers(i, "ftz", "NaN")
    quiet = (np.fmin, np.fmax) if "NaN" not in flags else (np.minimum, np.maximum)
    return compute(code, i, kind, [kind, kind], _flushing(quiet[i.parts[0] == "max"], flags))


def _sign(code: Code, i: Instruction) -> Step:
    """abs, neg."""
    flags, kind = _modifiers(i, "ftz")
    function = {"abs": np.absolute, "neg": np.negative}[i.parts[0]]
    return compute(code, i, kind, [kind], _flushing(function, flags))


_BY_TYPE: dict[str, tuple[Maker, Maker]] = {
    "add": (_sum_or_product, add_integers),
    "sub": (_sum_or_product, add_integers),
    "mul": (_sum_or_product, multiply_integers),
    "div": (_quotient, divide_integers),
    "min": (_extreme, order_integers),
    "max": (_extreme, order_integers),
    "abs": (_sign, negate_integers),
    "neg": (_sign, negate_integers),
}


@instruction(*_BY_TYPE)
def by_type(code: Code, i: Instruction) -> Step:
    """Instructions for floats and for integers."""
    floats, integers = _BY_TYPE[i.parts[0]]
    return (floats if is_float(i.parts[-1]) else integers)(code, i)


@instruction("fma")
def fused(code: Code, i: Instruction) -> Step:
    """fma.rn.f32."""
    flags, kind = _modifiers(i, "rn", "ftz")
    if kind != "f32" or "rn" not in flags:
        raise i.refuse("modifier not known")

    def multiply_add(a: Array, b: Array, c: Array) -> Array:
        return (a.astype(np.float64) * b + c).astype(np.float32)

    return compute(code, i, kind, [kind] * 3, _flushing(multiply_add, flags))


_ONE: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh,
}


@instruction(*_ONE)
def function(code: Code, i: Instruction) -> Step:
    """ex2, lg2, rcp, sqrt, rsqrt and tanh of one number."""
    flags, kind = _modifiers(i, "approx", "rn", "ftz")
    exact = "rn" in flags and i.parts[0] in ("rcp", "sqrt")
    if exact == ("approx" in flags) or (kind == "f64" and not exact):
        raise i.refuse("modifier not known")
    evaluate = _ONE[i.parts[0]]
    if kind == "f64":
        return compute(code, i, kind, [kind], evaluate)

    def rounded(x: Array) -> Array:
        return evaluate(x.astype(np.float64)).astype(np.float32)

    return compute(code, i, kind, [kind], _flushing(rounded, flags))


@instruction("copysign")
def copy_sign(code: Code, i: Instruction) -> Step:
    """copysign d, a, b: b with the sign of a."""
    _, kind = _modifiers(i)
    return compute(code, i, kind, [kind, kind], lambda a, b: np.copysign(b, a))
