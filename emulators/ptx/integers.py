"""Integers, predicates and bits.

Source: PTX ISA, "Integer Arithmetic Instructions", "Comparison and Selection Instructions" and
"Logic and Shift Instructions".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .parse import Immediate, Instruction, Refused
from .registers import TYPES, Array, is_float, is_signed, unsigned
from .table import Step, instruction

if TYPE_CHECKING:
    from .frame import Frame
    from .program import Code

INTEGERS = tuple(f"{sign}{bits}" for sign in "us" for bits in (16, 32, 64))
BITS = ("b16", "b32", "b64")


def expect(i: Instruction, *allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The modifiers behind the opcode's first word, each one of the allowed."""
    modifiers = i.parts[1:]
    fits = len(modifiers) == len(allowed) and all(
        m in names for m, names in zip(modifiers, allowed, strict=True)
    )
    if not fits:
        raise i.refuse("modifier not known")
    return modifiers


def compute(
    code: Code, i: Instruction, result: str, sources: list[str], function: Callable[..., Any]
) -> Step:
    """``d = function(sources)``, with a type for each operand."""
    if len(i.operands) != 1 + len(sources):
        raise i.refuse("number of operands")
    d = code.write(i.operands[0], result, i)
    slots = [code.read(o, kind, i) for o, kind in zip(i.operands[1:], sources, strict=True)]
    if not isinstance(function, np.ufunc):
        return lambda f: f.put(d, function(*[f.v[s] for s in slots]))
    if len(slots) == 1:
        (a,) = slots

        def one(f: Frame) -> None:
            function(f.v[a], out=f.v[d], where=f.mask)

        return one
    a, b = slots

    def two(f: Frame) -> None:
        function(f.v[a], f.v[b], out=f.v[d], where=f.mask)

    return two


def alike(code: Code, i: Instruction, kind: str, function: Any) -> Step:
    """``d = function(sources)``, all of one type; ``function`` is one of numpy's."""
    return compute(code, i, kind, [kind] * function.nin, function)


# -- sums and products

_WRAPPING = {"add": np.add, "sub": np.subtract}


def add_integers(code: Code, i: Instruction) -> Step:
    """add, sub: modulo 2^bits."""
    (kind,) = expect(i, INTEGERS)
    return alike(code, i, unsigned(kind), _WRAPPING[i.parts[0]])


def multiply_integers(code: Code, i: Instruction) -> Step:
    """mul.lo, mul.hi, mul.wide."""
    which, kind = expect(i, ("lo", "hi", "wide"), INTEGERS)
    if which == "lo":
        return alike(code, i, unsigned(kind), np.multiply)
    bits = 8 * TYPES[kind].itemsize
    if bits == 64:
        raise i.refuse("products of more than 64 bits")
    wide = f"{kind[0]}{2 * bits}"
    if which == "wide":
        return compute(code, i, wide, [kind] * 2, lambda a, b: a.astype(TYPES[wide]) * b)
    return compute(code, i, kind, [kind] * 2, lambda a, b: a.astype(TYPES[wide]) * b >> bits)


@instruction("mad")
def multiply_add(code: Code, i: Instruction) -> Step:
    """mad.lo, mad.wide: the product and a summand, modulo 2^bits."""
    which, kind = expect(i, ("lo", "wide"), INTEGERS)
    if which == "lo":
        kind = unsigned(kind)
        return compute(code, i, kind, [kind] * 3, lambda a, b, c: a * b + c)
    bits = 8 * TYPES[kind].itemsize
    if bits == 64:
        raise i.refuse("products of more than 64 bits")
    wide = f"{kind[0]}{2 * bits}"
    dtype = TYPES[wide]
    return compute(code, i, wide, [kind, kind, wide], lambda a, b, c: a.astype(dtype) * b + c)


def divide_integers(code: Code, i: Instruction) -> Step:
    """div, rem: towards zero; rem has the sign of the dividend. By zero is refused."""
    (kind,) = expect(i, INTEGERS)
    remainder = i.parts[0] == "rem"
    d = code.write(i.operands[0], kind, i)
    a, b = (code.read(operand, kind, i) for operand in i.operands[1:])

    def step(f: Frame) -> None:
        dividend, divisor = f.only(f.v[a]), f.only(f.v[b])
        if not divisor.all():
            raise Refused("a division by zero")
        rest = np.fmod(dividend, divisor)
        f.put_only(d, rest if remainder else (dividend - rest) // divisor)

    return step


instruction("rem")(divide_integers)


# -- others

_ONE = {"abs": np.absolute, "neg": np.negative, "not": np.invert, "cnot": np.logical_not}
_TWO = {"min": np.minimum, "max": np.maximum}
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def negate_integers(code: Code, i: Instruction) -> Step:
    """abs, neg; the least number stays what it is."""
    (kind,) = expect(i, ("s16", "s32", "s64"))
    return alike(code, i, kind, _ONE[i.parts[0]])


def order_integers(code: Code, i: Instruction) -> Step:
    """min, max."""
    (kind,) = expect(i, INTEGERS)
    return alike(code, i, kind, _TWO[i.parts[0]])


@instruction("and", "or", "xor")
def logic(code: Code, i: Instruction) -> Step:
    (kind,) = expect(i, (*BITS, "pred"))
    return alike(code, i, kind, _LOGIC[i.parts[0]])


@instruction("not")
def invert(code: Code, i: Instruction) -> Step:
    (kind,) = expect(i, (*BITS, "pred"))
    return alike(code, i, kind, np.invert)


@instruction("shl", "shr")
def shift(code: Code, i: Instruction) -> Step:
    """Amounts are 32 bits, more than the width counts as the width; shr.s brings in the sign."""
    left = i.parts[0] == "shl"
    (kind,) = expect(i, BITS if left else (*BITS, *INTEGERS))
    width, dtype = 8 * TYPES[kind].itemsize, TYPES[kind]

    def shifted(a: Array, amount: Array) -> Array:
        within = np.minimum(amount, width - 1).astype(dtype)
        moved = a << within if left else a >> within
        beyond = amount >= width
        if not beyond.any() or (is_signed(kind) and not left):
            return moved
        return np.where(beyond, dtype.type(0), moved)

    if isinstance(i.operands[2], Immediate) and code.number(i.operands[2], i) < width:
        amount = dtype.type(code.number(i.operands[2], i))
        move = np.left_shift if left else np.right_shift
        return compute(code, i, kind, [kind, kind], lambda a, _: move(a, amount))
    return compute(code, i, kind, [kind, "u32"], shifted)


@instruction("shf.l.wrap", "shf.r.wrap")
def funnel_shift(code: Code, i: Instruction) -> Step:
    """shf: of 64 bits {b, a}, by the amount modulo 32; the upper (l) or lower (r) half."""
    if i.parts[3:] != ("b32",):
        raise i.refuse("modifier not known")
    left = i.parts[1] == "l"

    def shifted(a: Array, b: Array, amount: Array) -> Array:
        both, by = b.astype(np.uint64) << 32 | a, (amount & 31).astype(np.uint64)
        return ((both << by >> 32 if left else both >> by) & 0xFFFFFFFF).astype(np.uint32)

    return compute(code, i, "b32", ["b32", "b32", "u32"], shifted)


@instruction("bfe")
def extract_bits(code: Code, i: Instruction) -> Step:
    """bfe: ``length`` bits from bit ``start``; signed ones are filled up with the field's sign."""
    (kind,) = expect(i, ("u32", "s32"))

    def extract(a: Array, start: Array, length: Array) -> Array:
        value, start = a.astype(np.int64), (start & 255).astype(np.int64)
        length = (length & 255).astype(np.int64)
        if (start + length > 32).any() or (length == 0).any():
            raise Refused("a bit field that is empty or ends outside of its register")
        field = value >> start & (1 << length) - 1
        sign = field >> length - 1 & 1 if kind == "s32" else 0
        return field - (sign << length)

    return compute(code, i, kind, [kind, "u32", "u32"], extract)


@instruction("bfi")
def insert_bits(code: Code, i: Instruction) -> Step:
    """bfi: the low ``length`` bits of a take the place of b's from bit ``start`` on."""
    expect(i, ("b32",))

    def insert(a: Array, b: Array, start: Array, length: Array) -> Array:
        start, length = (start & 255).astype(np.uint64), (length & 255).astype(np.uint64)
        mask = ((np.uint64(1) << np.minimum(length, 32)) - 1) << np.minimum(start, 32)
        moved = a.astype(np.uint64) << np.minimum(start, 32)
        return (b & ~mask | moved & mask).astype(np.uint32)

    return compute(code, i, "b32", ["b32", "b32", "u32", "u32"], insert)


# -- comparisons and selection

_ORDERED: dict[str, Any] = {"eq": np.equal, "ne": np.not_equal, "lt": np.less}
_ORDERED |= {"le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _comparison(i: Instruction, name: str, kind: str) -> Callable[[Array, Array], Array]:
    """Of floats: a comparison is false with a NaN, one with a u behind it true."""
    if not is_float(kind):
        if kind[0] == "u":
            name = _UNSIGNED_NAMES.get(name, name)
        if name not in _ORDERED or (kind[0] == "b" and name not in ("eq", "ne")):
            raise i.refuse("comparison not known")
        return _ORDERED[name]  # type: ignore[no-any-return]
    if name in ("num", "nan"):
        wanted = name == "nan"
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == wanted
    if name == "ne":  # numpy's own is true with a NaN
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    if name in _ORDERED:
        return _ORDERED[name]  # type: ignore[no-any-return]
    compare = _ORDERED.get(name.removesuffix("u"))
    if compare is None:
        raise i.refuse("comparison not known")
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


@instruction("setp")
def set_predicate(code: Code, i: Instruction) -> Step:
    """setp.compare[.and|.or|.xor].type p, a, b[, c]."""
    name, *logic, kind = i.parts[1:]
    if kind not in (*INTEGERS, *BITS, "f32", "f64") or logic not in ([], ["and"], ["or"], ["xor"]):
        raise i.refuse("modifier not known")
    compare = _comparison(i, name, kind)
    if not logic:
        return compute(code, i, "pred", [kind, kind], compare)
    combine = _LOGIC[logic[0]]
    return compute(code, i, "pred", [kind, kind, "pred"], lambda a, b, c: combine(compare(a, b), c))


@instruction("selp")
def select(code: Code, i: Instruction) -> Step:
    """selp d, a, b, p: a where p, else b."""
    (kind,) = expect(i, (*INTEGERS, *BITS, "f32", "f64"))
    return compute(code, i, kind, [kind, kind, "pred"], lambda a, b, p: np.where(p, a, b))
