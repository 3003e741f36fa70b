"""Arithmetic of the interpreter of AMD's machine code, against numbers of any size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from gcn.assembly import Unknown
from gcn.wave import LANES, VCC, Wave
from gcn_text import RANDOM, integers, numbers, run, wave


def lanes_of(w: Wave, first: int) -> list[int]:
    """64 bits of each lane."""
    return [int(lo) | int(hi) << 32 for lo, hi in zip(*w.u32[first : first + 2], strict=True)]


def copy_of(w: Wave) -> Wave:
    """The vector registers alone."""
    other = wave()
    for register, values in zip(other.u32, w.u32, strict=True):
        register[:] = values
    return other


def test_carries_make_64_bits_of_32() -> None:
    w = wave()
    for register in range(4):
        w.u32[register][:] = integers()
    w.u32[0][:8] = w.u32[2][:8] = 0
    a, b = lanes_of(w, 0), lanes_of(w, 2)
    text = """v_add_co_u32_e32 v4, vcc, v0, v2
              v_addc_co_u32_e32 v5, vcc, v1, v3, vcc
              v_sub_co_u32_e32 v6, vcc, v0, v2
              v_subb_co_u32_e32 v7, vcc, v1, v3, vcc
              v_subrev_co_u32_e64 v8, s[2:3], v0, v2
              v_subbrev_co_u32_e64 v9, s[2:3], v1, v3, s[2:3]
              v_mad_u64_u32 v[10:11], s[4:5], v0, v2, v[2:3]
              v_lshlrev_b64 v[12:13], 5, v[0:1]
              v_ashrrev_i64 v[14:15], 5, v[0:1]
              v_lshl_add_u64 v[16:17], v[0:1], 3, v[2:3]"""
    run(text, w)
    run("v_mad_i64_i32 v[18:19], s[6:7], v0, v2, v[2:3]", given := copy_of(w))
    pairs = list(zip(a, b, strict=True))
    sums = [signed(x % 2**32) * signed(y % 2**32) + y - (y >> 63 << 64) for x, y in pairs]
    assert lanes_of(given, 18) == [x % 2**64 for x in sums]
    assert given.pair(6) == sum((x < 0) << lane for lane, x in enumerate(sums))
    assert lanes_of(w, 4) == [(x + y) % 2**64 for x, y in pairs]
    assert lanes_of(w, 6) == [(x - y) % 2**64 for x, y in pairs]
    assert lanes_of(w, 8) == [(y - x) % 2**64 for x, y in pairs]
    products = [x % 2**32 * (y % 2**32) + y for x, y in pairs]
    assert lanes_of(w, 10) == [p % 2**64 for p in products]
    assert w.pair(4) == sum((p >> 64) << lane for lane, p in enumerate(products))
    assert lanes_of(w, 12) == [(x << 5) % 2**64 for x in a]
    assert lanes_of(w, 14) == [((x - (x >> 63 << 64)) >> 5) % 2**64 for x in a]
    assert lanes_of(w, 16) == [((x << 3) + y) % 2**64 for x, y in pairs]


def signed(x: int) -> int:
    return x - (x >> 31 << 32)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("v_mul_hi_u32 v2, v0, v1", lambda a, b: a * b >> 32),
        ("v_mul_lo_u32 v2, v0, v1", lambda a, b: a * b),
        ("v_mul_u32_u24_e32 v2, v0, v1", lambda a, b: a % 2**24 * (b % 2**24)),
        ("v_bfe_u32 v2, v0, 5, 9", lambda a, b: a >> 5 & 511),
        ("v_alignbit_b32 v2, v0, v1, 13", lambda a, b: (a << 32 | b) >> 13),
        ("v_ashrrev_i32_e32 v2, 7, v0", lambda a, b: signed(a) >> 7),
        ("v_lshl_or_b32 v2, v0, 4, v1", lambda a, b: a << 4 | b),
        ("v_ffbh_u32_e32 v2, v0", lambda a, b: 32 - a.bit_length() if a else -1),
        ("v_min_i32_e32 v2, v0, v1", lambda a, b: min(signed(a), signed(b))),
        ("v_sub_u16_e32 v2, v0, v1", lambda a, b: (a - b) % 2**16),
        ("v_add_u16_e32 v2, v0, v1", lambda a, b: (a + b) % 2**16),
        ("v_lshrrev_b16_e64 v2, 3, v0", lambda a, b: a % 2**16 >> 3),
        ("v_subrev_u32_e32 v2, 0x12345, v1", lambda a, b: b - 0x12345),
        ("v_bfe_i32 v2, v0, 4, 7", lambda a, b: (a >> 4 & 127) - ((a >> 10 & 1) << 7)),
        ("v_bfe_i32 v2, v0, 4, 0", lambda a, b: 0),
        ("v_bfrev_b32_e32 v2, v0", lambda a, b: int(f"{a:032b}"[::-1], 2)),
        ("v_pack_b32_f16 v2, v0, v1", lambda a, b: a % 2**16 | b << 16),
        ("v_xad_u32 v2, v0, 8, v1", lambda a, b: (a ^ 8) + b),
        ("v_sub_u32_e64 v2, v0, v1 clamp", lambda a, b: max(a - b, 0)),
        (
            "v_cndmask_b32_sdwa v2, v0, v1, vcc dst_sel:DWORD dst_unused:UNUSED_PAD "
            "src0_sel:DWORD src1_sel:WORD_1",
            lambda a, b: b >> 16 if a % 2 else a,
        ),
        (
            "v_perm_b32 v2, v0, v1, 0x70c0104",
            lambda a, b: (a >> 24) << 24 | (b >> 8 & 255) << 8 | a & 255,
        ),
        ("v_xor_b32_e32 v2, -1, v1", lambda a, b: b ^ 0xFFFF_FFFF),
    ],
)
def test_integers(text: str, value: Callable[[int, int], int]) -> None:
    w = wave()
    w.u32[0][:], w.u32[1][:] = integers(), integers()
    w.u32[0][0] = 0
    w.set_pair(VCC, sum(1 << i for i, a in enumerate(w.u32[0].tolist()) if a % 2))
    run(text, w)
    given = zip(w.u32[0].tolist(), w.u32[1].tolist(), strict=True)
    assert w.u32[2].tolist() == [value(a, b) % 2**32 for a, b in given]


def test_scalar_arithmetic() -> None:
    w = wave()
    w.set_pair(0, 0x1234_5678_9ABC_DEF0)
    w.set_pair(2, 0xFFFF_0000_FFFF_0000)
    text = """s_add_u32 s4, s0, s2
              s_addc_u32 s5, s1, s3
              s_sub_u32 s6, s0, s2
              s_subb_u32 s7, s1, s3
              s_mul_hi_u32 s8, s0, s2
              s_ashr_i64 s[10:11], s[2:3], 8
              s_bfe_i64 s[12:13], s[2:3], 0x200000
              s_movk_i32 s14, 0xff80
              s_cmp_lt_i32 s14, 0
              s_cselect_b64 s[16:17], -1, 0
              s_addk_i32 s14, 0x81
              s_cselect_b32 s20, 1, 2
              s_cmpk_gt_u32 s2, 0xffff
              s_cselect_b32 s21, 1, 2
              s_lshl2_add_u32 s22, s0, s14
              s_orn2_b64 s[18:19], s[0:1], s[2:3]
              s_min_u32 s23, s1, s2
              s_cselect_b32 s24, 1, 2"""
    run(text, w)
    a, b, ones = w.pair(0), w.pair(2), 2**64 - 1
    assert w.pair(4) == (a + b) & ones
    assert w.pair(6) == (a - b) & ones
    assert w.s[8] == (a % 2**32) * (b % 2**32) >> 32
    assert w.pair(10) == ((b - 2**64) >> 8) & ones
    assert w.pair(12) == 0xFFFF_FFFF_FFFF_0000
    assert w.s[14] == 1
    assert w.s[20:23] == [2, 1, (4 * (a % 2**32) + 1) % 2**32]
    assert w.pair(16) == ones
    assert w.pair(18) == a | (b ^ ones)
    assert w.s[23:25] == [0x1234_5678, 1]


# -- floating point


DIVISION = """v_div_scale_f32 v2, s[0:1], v0, v0, v1
           v_div_scale_f32 v3, vcc, v1, v0, v1
           v_rcp_f32_e32 v4, v2
           v_fma_f32 v5, -v2, v4, 1.0
           v_fmac_f32_e32 v4, v5, v4
           v_mul_f32_e32 v5, v3, v4
           v_fma_f32 v6, -v2, v5, v3
           v_fmac_f32_e32 v5, v6, v4
           v_fma_f32 v2, -v2, v5, v3
           v_div_fmas_f32 v2, v2, v4, v5
           v_div_fixup_f32 v2, v2, v0, v1"""


def test_a_division_in_steps_is_the_quotient() -> None:
    w = wave()
    a, b = numbers(), numbers() * np.float32(1e-3)
    a[:7] = (0, 1e-33, 3e38, -1e-36, 5, 1, 1)
    b[:7] = (-3, 2, 2e38, -1e-38, -np.inf, 0, np.nan)
    w.f32[0][:], w.f32[1][:] = b, a  # v1 / v0
    run(DIVISION, w)
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(w.f32[2], a / b, rtol=3e-7, atol=0)


def test_a_division_that_is_scaled_back_is_refused() -> None:
    w = wave()
    w.f32[0][:], w.f32[1][:] = 1e-10, 1e30
    with pytest.raises(Unknown, match="v_div_fmas_f32"):
        run(DIVISION, w)


def test_a_division_of_fp64_in_steps_is_the_quotient() -> None:
    w = wave()
    a, b = (RANDOM.standard_normal(LANES) for _ in range(2))
    for register, x in ((0, b), (2, a)):
        w.u32[register][:], w.u32[register + 1][:] = x.view(np.uint32).reshape(-1, 2).T
    text = """v_div_scale_f64 v[4:5], s[0:1], v[0:1], v[0:1], v[2:3]
              v_rcp_f64_e32 v[6:7], v[4:5]
              v_fma_f64 v[8:9], -v[4:5], v[6:7], 1.0
              v_fmac_f64_e32 v[6:7], v[6:7], v[8:9]
              v_fma_f64 v[8:9], -v[4:5], v[6:7], 1.0
              v_fmac_f64_e32 v[6:7], v[6:7], v[8:9]
              v_div_scale_f64 v[8:9], vcc, v[2:3], v[0:1], v[2:3]
              v_mul_f64 v[10:11], v[8:9], v[6:7]
              v_fma_f64 v[4:5], -v[4:5], v[10:11], v[8:9]
              v_div_fmas_f64 v[4:5], v[4:5], v[6:7], v[10:11]
              v_div_fixup_f64 v[4:5], v[4:5], v[0:1], v[2:3]"""
    run(text, w)
    got = np.stack(w.u32[4:6], -1).copy().view(np.float64)[:, 0]
    assert np.array_equal(got, a / b)


def test_conversions() -> None:
    w = wave()
    w.f32[0][:] = numbers() * np.float32(100)
    w.f32[0][:7] = (np.nan, -1, 5e9, 2**-25, 6e-8, 70000, -0.0)
    text = """v_cvt_u32_f32_e32 v1, v0
              v_cvt_f16_f32_e32 v2, v0
              v_cvt_f16_f32_sdwa v3, v0 dst_sel:WORD_1 dst_unused:UNUSED_PAD src0_sel:DWORD
              v_cvt_f32_f16_sdwa v4, v3 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1
              v_or_b32_sdwa v5, v2, v3 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:DWORD \
src1_sel:WORD_1
              v_cmp_o_f32_e32 vcc, v0, v0"""
    run(text, w)
    with np.errstate(all="ignore"):
        want = w.f32[0].astype(np.float16)
        assert w.u32[1][:3].tolist() == [0, 0, 2**32 - 1]
        inside = np.clip(w.f32[0][3:].astype(np.float64), 0, None)
        assert np.array_equal(w.u32[1][3:], inside.astype(np.uint32))
    assert np.array_equal(w.u32[2], want.view(np.uint16))
    assert np.array_equal(w.u32[3], want.view(np.uint16).astype(np.uint32) << 16)
    assert np.array_equal(w.f32[4], want.astype(np.float32), equal_nan=True)
    assert np.array_equal(w.u32[5], w.u32[2])
    assert w.pair(VCC) == 2**64 - 2


def test_packed_numbers() -> None:
    w = wave()
    for register in range(6):
        w.f32[register][:] = numbers()
    a, b, c = ([w.f32[n].copy(), w.f32[n + 1].copy()] for n in (0, 2, 4))
    text = """v_pk_mul_f32 v[6:7], v[0:1], v[2:3] op_sel_hi:[0,1]
              v_pk_add_f32 v[8:9], v[0:1], v[2:3] neg_lo:[0,1] neg_hi:[0,1]
              v_pk_fma_f32 v[10:11], v[0:1], v[2:3], v[4:5] op_sel_hi:[1,0,1]
              v_pk_mov_b32 v[0:1], v[2:3], v[0:1] op_sel:[0,1]"""
    run(text, w)
    assert np.array_equal(w.f32[6], a[0] * b[0])
    assert np.array_equal(w.f32[7], a[0] * b[1])
    assert np.array_equal(w.f32[8], a[0] - b[0])
    assert np.array_equal(w.f32[9], a[1] - b[1])
    np.testing.assert_allclose(w.f32[11], a[1] * b[0].astype(np.float64) + c[1], rtol=1e-6)
    assert np.array_equal(w.f32[0], b[0])
    assert np.array_equal(w.f32[1], a[1])


def test_halves_in_fused_products() -> None:
    w = wave()
    w.f32[0][:], w.f32[1][:], w.u32[2][:] = numbers(), numbers(), 0x1234_5678
    text = """v_fma_mixlo_f16 v2, v0, v1, 0
              v_fma_mixhi_f16 v2, v0, v0, 0
              v_fma_mix_f32 v3, v2, v2, v0 op_sel:[1,0,0] op_sel_hi:[1,1,0]"""
    run(text, w)
    low = (w.f32[0] * w.f32[1]).astype(np.float16)
    high = (w.f32[0] * w.f32[0]).astype(np.float16)
    assert np.array_equal(w.u32[2] & 0xFFFF, low.view(np.uint16))
    assert np.array_equal(w.u32[2] >> 16, high.view(np.uint16))
    want = high.astype(np.float64) * low + w.f32[0]
    np.testing.assert_allclose(w.f32[3], want, rtol=1e-6, atol=1e-6)
