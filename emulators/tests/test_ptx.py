"""The PTX interpreter: arithmetic and conversions, against what the PTX ISA says."""

from __future__ import annotations

from typing import Any

import numpy as np
import ptx
import pytest
import torch
from ptx_programs import run


def binary(opcode: str, kind: str, pairs: list[tuple[Any, Any]], dtype: str, result: str) -> list:
    """The instruction's results for pairs of numbers, one a thread."""
    given = np.array(pairs + [pairs[-1]] * (32 - len(pairs)), dtype)
    wide = given.dtype.itemsize == 8
    a, b = ("%rd1", "%rd2") if wide else ("%r1", "%r2")
    bits = np.dtype(result).itemsize * 8
    d = "%rd3" if bits == 64 else "%r3"
    body = f"""
  ld.global.v2.b{64 if wide else 32} {{{a}, {b}}}, [%rd20];
  {opcode}.{kind} {d}, {a}, {b};
  st.global.b{bits} [%rd21], {d};"""
    return run(body, given, result)[: len(pairs), 0].tolist()


# -- arithmetic


def test_integers() -> None:
    low, high = -(2**31), 2**31 - 1
    assert binary("add", "s32", [(high, 1), (-5, 3)], "<i4", "<i4") == [low, -2]
    assert binary("sub", "u32", [(0, 1)], "<u4", "<u4") == [2**32 - 1]
    assert binary("mul.lo", "s32", [(1 << 20, 1 << 13), (-3, 5)], "<i4", "<i4") == [0, -15]
    assert binary("mul.hi", "s32", [(low, 2), (-1, 1)], "<i4", "<i4") == [-1, -1]
    assert binary("mul.hi", "u32", [(2**31, 6)], "<u4", "<u4") == [3]
    assert binary("mul.wide", "s32", [(low, low), (-7, 9)], "<i4", "<i8") == [2**62, -63]
    assert binary("mul.wide", "u32", [(2**32 - 1, 2**32 - 1)], "<u4", "<u8") == [(2**32 - 1) ** 2]
    assert binary("min", "s32", [(-1, 1)], "<i4", "<i4") == [-1]
    assert binary("min", "u32", [(2**32 - 1, 1)], "<u4", "<u4") == [1]


def test_division_is_towards_zero() -> None:
    pairs = [(7, 2), (-7, 2), (7, -2), (-7, -2), (6, 3), (-(2**31), 3)]
    assert binary("div", "s32", pairs, "<i4", "<i4") == [3, -3, -3, 3, 2, -715827882]
    assert binary("rem", "s32", pairs, "<i4", "<i4") == [1, -1, 1, -1, 0, -2]
    large = [(-(2**62) - 1, 3), (2**62 + 1, -(2**40))]
    assert binary("div", "s64", large, "<i8", "<i8") == [-((2**62 + 1) // 3), -(2**22)]
    assert binary("div", "u32", [(2**32 - 1, 2)], "<u4", "<u4") == [2**31 - 1]
    with pytest.raises(ptx.Refused, match=r"division by zero(.|\n)*div.s32"):
        binary("div", "s32", [(1, 0)], "<i4", "<i4")


def test_shifts_end_at_the_width() -> None:
    amounts = [0, 1, 31, 32, 33, 2**32 - 1]
    pairs = [(0x80000001, amount) for amount in amounts]
    left = [0x80000001, 2, 0x80000000, 0, 0, 0]
    assert binary("shl", "b32", pairs, "<u4", "<u4") == left
    assert binary("shr", "u32", pairs, "<u4", "<u4") == [0x80000001, 0x40000000, 1, 0, 0, 0]
    signed = [0x80000001, 0xC0000000] + [0xFFFFFFFF] * 4
    assert binary("shr", "s32", pairs, "<u4", "<u4") == signed
    body = """
  ld.global.v2.b32 {%r1, %r2}, [%rd20];
  shf.l.wrap.b32 %r3, %r1, %r1, 31;
  shf.r.wrap.b32 %r4, %r1, %r2, 36;
  bfe.u32 %r5, %r1, 4, 8;
  bfe.s32 %r6, %r1, 4, 8;
  st.global.v4.b32 [%rd21], {%r3, %r4, %r5, %r6};"""
    given = np.array([(0xABCDEF81, 0x00000005)] * 32, "<u4")
    got = run(body, given, "<u4", 4)[0].tolist()
    assert got == [0xD5E6F7C0, 0x5ABCDEF8, 0xF8, 0xFFFFFFF8]


FLOATS = [0.0, -0.0, 1.0, -1.5, 3.0e38, 1e-40, np.inf, -np.inf, np.nan, 7.25]


@pytest.mark.parametrize("name", ["lt", "le", "gt", "ge", "eq", "ne"])
@pytest.mark.parametrize("unordered", ["", "u"])
def test_comparisons_with_nan(name: str, unordered: str) -> None:
    pairs = [(a, b) for a in (1.0, 2.0, np.nan) for b in (1.0, 2.0, np.nan)]
    given = np.array(pairs + [pairs[0]] * (32 - len(pairs)), "<f4")
    body = f"""
  ld.global.v2.f32 {{%f1, %f2}}, [%rd20];
  setp.{name}{unordered}.f32 %p1, %f1, %f2;
  selp.b32 %r1, 1, 0, %p1;
  st.global.b32 [%rd21], %r1;"""
    compare = getattr(np, {"lt": "less", "le": "less_equal", "gt": "greater"}.get(name, "equal"))
    compare = {"ge": np.greater_equal, "ne": np.not_equal}.get(name, compare)
    nan = np.isnan(given).any(1)
    want = np.where(nan, unordered == "u", compare(given[:, 0], given[:, 1]))
    assert run(body, given, "<u4")[:, 0].tolist() == want.astype(int).tolist()


def test_approximations_flush_subnormal_numbers() -> None:
    given = np.array([[x] for x in (FLOATS * 4)[:32]], "<f4")
    body = """
  ld.global.f32 %f1, [%rd20];
  ex2.approx.ftz.f32 %f2, %f1;
  rcp.approx.ftz.f32 %f3, %f1;
  add.ftz.f32 %f4, %f1, 0f00000000;
  add.f32 %f5, %f1, 0f00000000;
  st.global.v4.f32 [%rd21], {%f2, %f3, %f4, %f5};"""
    got = run(body, given, "<f4", 4)
    tiny = FLOATS.index(1e-40)
    assert got[tiny].tolist()[:3] == [1.0, np.inf, 0.0]
    assert got[tiny, 3] == np.float32(1e-40)
    x = given[:, 0].astype(np.float64)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got[:, 0], np.exp2(x).astype(np.float32))
        assert got[FLOATS.index(3.0e38), 1] == 0  # its reciprocal is subnormal


def test_a_fused_product_is_rounded_once() -> None:
    a, b, c = (np.float32(x) for x in (1 + 2**-12, 1 + 2**-12, -1 - 2**-11))
    body = """
  ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd20];
  fma.rn.f32 %f5, %f1, %f2, %f3;
  mul.f32 %f6, %f1, %f2;
  add.f32 %f6, %f6, %f3;
  st.global.v2.f32 [%rd21], {%f5, %f6};"""
    got = run(body, np.array([[a, b, c, 0]] * 32, "<f4"), "<f4", 2)
    assert got[0].tolist() == [2.0**-24, 0.0]


# -- conversions


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_rounding_to_16_bits(kind: str, dtype: torch.dtype) -> None:
    """Random bits, halfway cases, overflow, subnormal numbers; torch is the judge."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, (4096, 2), dtype=np.uint32)
    bits[:1024] = bits[:1024] & 0xFFFF0000 | 0x8000  # halfway between two of bf16
    bits[1024:2048] = bits[1024:2048] & 0x07FFE000 | 0x38001000  # of fp16
    given = bits.view(np.float32)
    body = f"""
  ld.global.v2.f32 {{%f1, %f2}}, [%rd20];
  cvt.rn.{kind}x2.f32 %r1, %f1, %f2;
  cvt.rn.{kind}.f32 %h1, %f1;
  mov.b32 %r2, {{%h1, %h1}};
  st.global.v2.b32 [%rd21], {{%r1, %r2}};"""
    got = np.concatenate([run(body, part, "<u4", 2) for part in given.reshape(-1, 32, 2)])
    upper, lower = (
        torch.from_numpy(given[:, n].copy()).to(dtype).view(torch.uint16).numpy() for n in (0, 1)
    )
    nan = np.isnan(given)
    upper, lower = (np.where(nan[:, n], 0x7FFF, x) for n, x in ((0, upper), (1, lower)))
    np.testing.assert_array_equal(got[:, 0] >> 16, upper)  # the first operand
    np.testing.assert_array_equal(got[:, 0] & 0xFFFF, lower)
    np.testing.assert_array_equal(got[:, 1], upper.astype(np.uint32) * 0x10001)


def test_conversions_of_integers() -> None:
    body = """
  ld.global.f64 %fd1, [%rd20];
  cvt.rzi.u32.f64 %r1, %fd1;
  cvt.rzi.s32.f64 %r2, %fd1;
  cvt.rni.s32.f64 %r3, %fd1;
  cvt.u16.u32 %h1, %r2;
  cvt.s32.s16 %r4, %h1;
  st.global.v4.b32 [%rd21], {%r1, %r2, %r3, %r4};"""
    values = [2.5, 3.5, -2.5, 1e30, -1e30, np.nan, 40000.7]
    given = np.array([[x] for x in values + [0.0] * 25], "<f8")
    got = run(body, given, "<i4", 4)[: len(values)]
    assert got.view(np.uint32)[:, 0].tolist() == [2, 3, 0, 2**32 - 1, 0, 0, 40000]
    assert got[:, 1].tolist() == [2, 3, -2, 2**31 - 1, -(2**31), 0, 40000]
    assert got[:, 2].tolist() == [2, 4, -2, 2**31 - 1, -(2**31), 0, 40001]
    assert got[:, 3].tolist() == [2, 3, -2, -1, 0, 0, 40000 - 65536]


def test_loads_extend_and_stores_cut() -> None:
    body = """
  ld.global.s8 %h1, [%rd20+1];
  ld.global.u8 %h2, [%rd20+1];
  ld.global.s32 %rd1, [%rd20];
  ld.global.u32 %rd2, [%rd20];
  mov.b32 %r1, {%h1, %h2};
  st.global.b32 [%rd21], %r1;
  st.global.b32 [%rd21+4], 0;
  st.global.u8 [%rd21+4], %r1;
  st.global.v2.b64 [%rd21+16], {%rd1, %rd2};"""
    got = run(body, np.full((32, 1), 0x8000FE01, "<u4"), "<u4", 8)
    assert got[0].tolist() == [0x00FEFFFE, 0xFE, 0, 0, 0x8000FE01, 0xFFFFFFFF, 0x8000FE01, 0]


def test_parts_of_registers_and_inner_scopes() -> None:
    body = """
  ld.global.b64 %rd1, [%rd20];
  mov.b64 {%r1, %r2}, %rd1;
  {
    .reg .b32 %r2;
    .reg .pred low;
    mov.b32 %r2, 77;
    setp.eq.u32 low, %r2, 77;
    @!low bra end;
    add.u32 %r1, %r1, 1;
  end:
  }
  mov.b64 %rd2, {%r2, %r1};
  st.global.b64 [%rd21], %rd2;"""
    got = run(body, np.full((32, 1), 0x0000000500000009, "<u8"), "<u8")
    assert got[0, 0] == 0x0000000A00000005
