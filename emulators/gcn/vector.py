"""Vector arithmetic.

Source: "CDNA3 ISA" 6 "Vector ALU Operations", 12.7-12.12 (VOP2, VOP1, VOPC, VOP3, VOP3P, SDWA).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from . import conversions as convert
from . import dpp
from .assembly import Instruction, Unknown
from .operands import Reader, reader, scalar_reader, scalar_writer, writer
from .scalar import Step
from .wave import Wave, bits_of, mask_of

_U32, _U64 = np.uint32, np.uint64


def _shift(bits: int) -> Any:
    return (_U32 if bits == 32 else _U64)(bits - 1)


def _i24(x: Any) -> Any:
    return (x << _U32(8)).view(np.int32) >> np.int32(8)


def _low24(x: Any) -> Any:
    return x & _U32(0xFFFFFF)


def _wide(x: Any) -> Any:
    return x.astype(_U64)


def _align_bits(a: Any, b: Any, c: Any) -> Any:
    return ((_wide(a) << _U64(32) | _wide(b)) >> _wide(c & _U32(31))).astype(_U32)


def _extract(a: Any, offset: Any, width: Any) -> Any:
    ones = (_U64(1) << _wide(width & _U32(31))) - _U64(1)
    return a >> (offset & _U32(31)) & ones.astype(_U32)


def _extract_signed(a: Any, offset: Any, width: Any) -> Any:
    kept, above = _extract(a, offset, width), _U32(32) - (width & _U32(31))
    moved = np.where(above == 32, _U32(0), kept << (above & _U32(31)))
    return moved.view(np.int32) >> (above & _U32(31)).view(np.int32)


# result and sources: function. Vector registers may stand for any source, constants too.
_FUNCTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "v_mov_b32": ("u32 u32", lambda a: a),
    "v_mov_b64": ("u64 u64", lambda a: a),
    "v_accvgpr_read_b32": ("u32 u32", lambda a: a),
    "v_accvgpr_write_b32": ("u32 u32", lambda a: a),
    "v_accvgpr_mov_b32": ("u32 u32", lambda a: a),
    "v_not_b32": ("u32 u32", lambda a: ~a),
    "v_and_b32": ("u32 u32 u32", lambda a, b: a & b),
    "v_or_b32": ("u32 u32 u32", lambda a, b: a | b),
    "v_xor_b32": ("u32 u32 u32", lambda a, b: a ^ b),
    "v_and_or_b32": ("u32 u32 u32 u32", lambda a, b, c: a & b | c),
    "v_or3_b32": ("u32 u32 u32 u32", lambda a, b, c: a | b | c),
    "v_add_u32": ("u32 u32 u32", lambda a, b: a + b),
    "v_sub_u32": ("u32 u32 u32", lambda a, b: a - b),
    "v_subrev_u32": ("u32 u32 u32", lambda a, b: b - a),
    "v_add3_u32": ("u32 u32 u32 u32", lambda a, b, c: a + b + c),
    "v_lshl_add_u32": ("u32 u32 u32 u32", lambda a, b, c: (a << (b & _shift(32))) + c),
    "v_add_lshl_u32": ("u32 u32 u32 u32", lambda a, b, c: (a + b) << (c & _shift(32))),
    "v_lshl_or_b32": ("u32 u32 u32 u32", lambda a, b, c: a << (b & _shift(32)) | c),
    "v_lshl_add_u64": ("u64 u64 u32 u64", lambda a, b, c: (a << _wide(b & _U32(7))) + c),
    "v_lshlrev_b32": ("u32 u32 u32", lambda a, b: b << (a & _shift(32))),
    "v_lshrrev_b32": ("u32 u32 u32", lambda a, b: b >> (a & _shift(32))),
    "v_ashrrev_i32": ("i32 i32 i32", lambda a, b: b >> (a & np.int32(31))),
    "v_lshlrev_b64": ("u64 u32 u64", lambda a, b: b << _wide(a & _U32(63))),
    "v_lshrrev_b64": ("u64 u32 u64", lambda a, b: b >> _wide(a & _U32(63))),
    "v_ashrrev_i64": ("i64 u32 i64", lambda a, b: b >> _wide(a & _U32(63)).view(np.int64)),
    "v_bfe_u32": ("u32 u32 u32 u32", _extract),
    "v_bfe_i32": ("i32 u32 u32 u32", _extract_signed),
    "v_bfrev_b32": ("u32 u32", convert.reversed_bits),
    "v_perm_b32": ("u32 u32 u32 u32", convert.permuted_bytes),
    "v_pack_b32_f16": ("u32 u32 u32", lambda a, b: a & _U32(0xFFFF) | b << _U32(16)),
    "v_xad_u32": ("u32 u32 u32 u32", lambda a, b, c: (a ^ b) + c),
    "v_alignbit_b32": ("u32 u32 u32 u32", _align_bits),
    "v_ffbh_u32": ("u32 u32", convert.leading_zeros),
    "v_mul_lo_u32": ("u32 u32 u32", lambda a, b: a * b),
    "v_mul_hi_u32": ("u32 u32 u32", lambda a, b: (_wide(a) * _wide(b) >> _U64(32)).astype(_U32)),
    "v_mul_u32_u24": ("u32 u32 u32", lambda a, b: _low24(a) * _low24(b)),
    "v_mul_i32_i24": ("i32 u32 u32", lambda a, b: _i24(a) * _i24(b)),
    "v_mad_u32_u24": ("u32 u32 u32 u32", lambda a, b, c: _low24(a) * _low24(b) + c),
    # of 16 bits: the upper half of the register becomes 0
    "v_mul_lo_u16": ("u32 u32 u32", lambda a, b: a * b & _U32(0xFFFF)),
    "v_sub_u16": ("u32 u32 u32", lambda a, b: a - b & _U32(0xFFFF)),
    "v_add_u16": ("u32 u32 u32", lambda a, b: a + b & _U32(0xFFFF)),
    "v_lshrrev_b16": ("u32 u32 u32", lambda a, b: (b & _U32(0xFFFF)) >> (a & _U32(15))),
    "v_lshlrev_b16": ("u32 u32 u32", lambda a, b: b << (a & _U32(15)) & _U32(0xFFFF)),
    "v_min_u32": ("u32 u32 u32", np.minimum),
    "v_max_u32": ("u32 u32 u32", np.maximum),
    "v_min_i32": ("i32 i32 i32", np.minimum),
    "v_max_i32": ("i32 i32 i32", np.maximum),
    "v_add_f32": ("f32 f32 f32", lambda a, b: a + b),
    "v_sub_f32": ("f32 f32 f32", lambda a, b: a - b),
    "v_subrev_f32": ("f32 f32 f32", lambda a, b: b - a),
    "v_mul_f32": ("f32 f32 f32", lambda a, b: a * b),
    "v_min_f32": ("f32 f32 f32", np.fmin),
    "v_max_f32": ("f32 f32 f32", np.fmax),
    "v_max3_f32": ("f32 f32 f32 f32", lambda a, b, c: np.fmax(np.fmax(a, b), c)),
    "v_fma_f32": ("f32 f32 f32 f32", convert.fma),
    "v_fmaak_f32": ("f32 f32 f32 f32", convert.fma),
    "v_fmamk_f32": ("f32 f32 f32 f32", convert.fma),
    "v_madmk_f32": ("f32 f32 f32 f32", convert.mad),
    "v_madak_f32": ("f32 f32 f32 f32", convert.mad),
    "v_exp_f32": ("f32 f32", convert.exp2),
    "v_log_f32": ("f32 f32", convert.log2),
    "v_rcp_f32": ("f32 f32", lambda a: np.float32(1) / a),
    "v_rcp_iflag_f32": ("f32 f32", lambda a: np.float32(1) / a),
    "v_trunc_f32": ("f32 f32", np.trunc),
    "v_ldexp_f32": ("f32 f32 i32", convert.scale_f32),
    "v_div_fixup_f32": ("f32 f32 f32 f32", convert.div_fixup),
    "v_add_f64": ("f64 f64 f64", lambda a, b: a + b),
    "v_mul_f64": ("f64 f64 f64", lambda a, b: a * b),
    "v_fma_f64": ("f64 f64 f64 f64", convert.fma_f64),
    "v_rcp_f64": ("f64 f64", convert.rough_reciprocal),
    "v_ldexp_f64": ("f64 f64 i32", lambda a, b: np.ldexp(a, b)),
    "v_div_fixup_f64": ("f64 f64 f64 f64", convert.div_fixup),
    "v_cvt_f32_u32": ("f32 u32", lambda a: a.astype(np.float32)),
    "v_cvt_f32_i32": ("f32 i32", lambda a: a.astype(np.float32)),
    "v_cvt_u32_f32": ("u32 f32", convert.to_u32),
    "v_cvt_u32_f64": ("u32 f64", convert.to_u32),
    "v_cvt_f32_f64": ("f32 f64", lambda a: a.astype(np.float32)),
    "v_cvt_f64_f32": ("f64 f32", lambda a: a.astype(np.float64)),
    "v_cvt_f64_u32": ("f64 u32", lambda a: a.astype(np.float64)),
    "v_cvt_f64_i32": ("f64 i32", lambda a: a.astype(np.float64)),
    "v_cvt_f16_f32": ("u32 f32", convert.to_f16),
    "v_cvt_f32_f16": ("f32 u32", convert.from_f16),
}

# Those with CLAMP, which holds unsigned integers within 0 and 2^32 - 1.
_CLAMPED: dict[str, tuple[str, Callable[..., Any]]] = {
    "v_sub_u32": ("u32 u32 u32", lambda a, b: np.where(a > b, a - b, _U32(0))),
}

# destination += product
_ACCUMULATE: dict[str, tuple[str, Callable[..., Any]]] = {
    "v_fmac_f32": ("f32", convert.fma),
    "v_mac_f32": ("f32", convert.mad),
    "v_fmac_f64": ("f64", convert.fma_f64),
}

_RELATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_FLOAT_RELATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": _RELATIONS["eq"],
    "lg": lambda a, b: (a < b) | (a > b),
    "lt": _RELATIONS["lt"],
    "le": _RELATIONS["le"],
    "gt": _RELATIONS["gt"],
    "ge": _RELATIONS["ge"],
    "neq": lambda a, b: ~(a == b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "nlt": lambda a, b: ~(a < b),
    "nle": lambda a, b: ~(a <= b),
    "ngt": lambda a, b: ~(a > b),
    "nge": lambda a, b: ~(a >= b),
    "o": lambda a, b: (a == a) & (b == b),
    "u": lambda a, b: (a != a) | (b != b),
}


def build(instruction: Instruction) -> Step | None:
    """What a vector instruction does; None where this file does not know it."""
    name, operands = instruction.name, instruction.operands
    if name in _CLAMPED and "clamp" in instruction.modifiers:
        rest = {key: x for key, x in instruction.modifiers.items() if key != "clamp"}
        return _function(replace(instruction, modifiers=rest), *_CLAMPED[name])
    if name in _FUNCTIONS:
        return _function(instruction, *_FUNCTIONS[name])
    if name in _ACCUMULATE:
        instruction.allow()
        kind, function = _ACCUMULATE[name]
        put, *read = writer(operands[0], kind), *(reader(x, kind) for x in operands)
        return lambda w: put(w, function(read[1](w), read[2](w), read[0](w)))
    if name == "v_cndmask_b32" and instruction.encoding == "sdwa":
        return _choice(instruction)
    if name.startswith("v_cmp_"):
        return _comparison(instruction)
    if name in _CARRIES:
        return _carry(instruction, *_CARRIES[name])
    return None


def _function(instruction: Instruction, kinds: str, function: Callable[..., Any]) -> Step:
    result, *sources = kinds.split()
    operands = instruction.operands
    if len(operands) != 1 + len(sources):
        raise Unknown(instruction.text)
    if instruction.encoding == "dpp":
        return dpp.build(instruction, sources, function)
    put, read = writer(operands[0], result), _selected(instruction, operands[1:], sources)
    if instruction.encoding == "sdwa":
        put = _destination(instruction)
    if len(read) == 1:
        (a,) = read
        return lambda w: put(w, function(a(w)))
    if len(read) == 2:
        a, b = read
        return lambda w: put(w, function(a(w), b(w)))
    a, b, c = read
    return lambda w: put(w, function(a(w), b(w), c(w)))


_SELECT = {f"BYTE_{i}": (8 * i, 0xFF) for i in range(4)} | {
    "WORD_0": (0, 0xFFFF),
    "WORD_1": (16, 0xFFFF),
    "DWORD": (0, 0xFFFFFFFF),
}


def _selected(instruction: Instruction, texts: tuple[str, ...], kinds: list[str]) -> list[Reader]:
    """Sources; of SDWA only some of their bits ("CDNA3 ISA" 12.14, "SDWA")."""
    if instruction.encoding != "sdwa":
        instruction.allow()
        return [reader(text, kind) for text, kind in zip(texts, kinds, strict=True)]
    instruction.allow("dst_sel", "dst_unused", "src0_sel", "src1_sel")
    return [
        _part(text, kind, instruction.modifiers[f"src{i}_sel"])
        for i, (text, kind) in enumerate(zip(texts, kinds, strict=True))
    ]


def _part(text: str, kind: str, select: str) -> Reader:
    if select == "DWORD":
        return reader(text, kind)
    if kind[0] == "f":
        raise Unknown(f"{select} of {text} as {kind}")
    read, (shift, ones) = reader(text, "u32"), _SELECT[select]
    number = np.uint32 if kind == "u32" else np.int32
    return lambda w: (read(w) >> _U32(shift) & _U32(ones)).view(number)


def _destination(instruction: Instruction) -> Callable[[Wave, Any], None]:
    if instruction.modifiers.get("dst_unused") != "UNUSED_PAD":
        raise Unknown(instruction.text)
    put = writer(instruction.operands[0], "u32")
    shift, ones = _SELECT[instruction.modifiers["dst_sel"]]
    return lambda w, x: put(w, (x.view(_U32) & _U32(ones)) << _U32(shift))


def _choice(instruction: Instruction) -> Step:
    """The second source where the mask has a 1, of some of their bits."""
    put, mask = _destination(instruction), scalar_reader(instruction.operands[3], 64)
    a, b = _selected(instruction, instruction.operands[1:3], ["u32", "u32"])
    return lambda w: put(w, np.where(mask_of(mask(w)), b(w), a(w)))


def _comparison(instruction: Instruction) -> Step:
    """Lanes that are not active get a 0."""
    _, _, relation, kind = instruction.name.split("_")
    compare = (_FLOAT_RELATIONS if kind[0] == "f" else _RELATIONS).get(relation)
    if compare is None:
        raise Unknown(instruction.text)
    put = scalar_writer(instruction.operands[0], 64)
    a, b = _selected(instruction, instruction.operands[1:], [kind, kind])
    return lambda w: put(w, bits_of(compare(a(w), b(w)) & w.mask))


def _add(a: Any, b: Any, carry: Any) -> Any:
    return _wide(a) + _wide(b) + carry


def _subtract(a: Any, b: Any, carry: Any) -> Any:
    return _wide(a) - _wide(b) - carry  # borrows from bit 32 on


# function, whether the sources are exchanged, whether there is a carry in
_CARRIES: dict[str, tuple[Callable[..., Any], bool, bool]] = {
    "v_add_co_u32": (_add, False, False),
    "v_addc_co_u32": (_add, False, True),
    "v_sub_co_u32": (_subtract, False, False),
    "v_subb_co_u32": (_subtract, False, True),
    "v_subrev_co_u32": (_subtract, True, False),
    "v_subbrev_co_u32": (_subtract, True, True),
}


def _carry(instruction: Instruction, function: Any, exchanged: bool, carry_in: bool) -> Step:
    instruction.allow()
    operands = instruction.operands
    put, put_carry = writer(operands[0], "u32"), scalar_writer(operands[1], 64)
    a, b = (reader(x, "u32") for x in operands[2:4])
    if exchanged:
        a, b = b, a
    carry = scalar_reader(operands[4], 64) if carry_in else lambda w: 0

    def step(w: Wave) -> None:
        total = function(a(w), b(w), mask_of(carry(w)).astype(_U64))
        put(w, total.astype(_U32))
        put_carry(w, bits_of((total >> _U64(32) != 0) & w.mask))

    return step
