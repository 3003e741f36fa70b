"""The interpreter of AMD's machine code: layouts, lanes, conversions, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gcn.assembly import Unknown, parse_body, parse_line
from gcn.machine import STEPS_OF_A_WAVE, Program, build, run_waves
from gcn.memory import Lds, Memory
from gcn.wave import FIRST_AGPR, LANES, VCC, Hazard, Wave
from numpy.typing import NDArray

RANDOM = np.random.default_rng(7)
LANE = np.arange(LANES)


def wave(late: bool = True, lds: Lds | None = None, memory: Memory | None = None) -> Wave:
    return Wave(memory or Memory(), lds or Lds(4096), late)


def program(text: str) -> Program:
    lines = (line.strip() for line in text.splitlines())
    return Program.of_text("\n".join(x if x.startswith(".L") else f"\t{x}" for x in lines))


def run(text: str, *waves: Wave) -> Wave:
    """To the end of the text; returns the first wave."""
    given = list(waves) or [wave()]
    run_waves(program(f"{text}\ns_endpgm"), given)
    return given[0]


def numbers(count: int = LANES) -> NDArray[np.float32]:
    return RANDOM.standard_normal(count).astype(np.float32)


def integers() -> NDArray[np.uint32]:
    return RANDOM.integers(0, 2**32, LANES, dtype=np.uint32)


# -- matrices, with indices written by hand from AMD's matrix instruction calculator


def halves(kind: str, shape: tuple[int, int]) -> tuple[NDArray[np.uint16], NDArray[np.float64]]:
    """Bits of random numbers, and the numbers."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    x = torch.from_numpy(RANDOM.standard_normal(shape)).to(dtype)
    return x.view(torch.uint16).numpy(), x.double().numpy()


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("size", ["16x16x16", "32x32x8"])
def test_matrix_products(size: str, kind: str, accumulates: bool) -> None:
    rows, depth = (16, 16) if size == "16x16x16" else (32, 8)
    (a_bits, a), (b_bits, b) = halves(kind, (rows, depth)), halves(kind, (depth, rows))
    c, w, count = numbers(rows * rows).reshape(rows, rows), wave(), rows * rows // LANES

    def row_of(lane: int, register: int) -> int:
        if rows == 16:
            return 4 * (lane // 16) + register
        return 8 * (register // 4) + 4 * (lane // 32) + register % 4

    for lane in range(LANES):
        for pair in range(2):
            ks = [4 * (lane // rows) + 2 * pair + half for half in range(2)]
            i = lane % rows
            w.u32[10 + pair][lane] = int(a_bits[i, ks[0]]) | int(a_bits[i, ks[1]]) << 16
            w.u32[20 + pair][lane] = int(b_bits[ks[0], i]) | int(b_bits[ks[1], i]) << 16
        for register in range(count):
            w.f32[FIRST_AGPR + register][lane] = c[row_of(lane, register), lane % rows]
    w.exec = 1  # which it does not look at
    before = f"a[0:{count - 1}]" if accumulates else "0"
    run(f"v_mfma_f32_{size}_{kind} a[32:{31 + count}], v[10:11], v[20:21], {before}", w)
    want = a @ b + (c if accumulates else 0)
    for lane in range(LANES):
        for register in range(count):
            got = w.f32[FIRST_AGPR + 32 + register][lane]
            assert abs(got - want[row_of(lane, register), lane % rows]) < 1e-5


def test_gfx90a_multiplies_denormals_as_zeros() -> None:
    for flushes in (False, True):
        w = wave()
        w.flushes_denormals = flushes
        for register in range(2):
            w.u32[register][:] = 0x0200_0200  # 2^-15
            w.u32[2 + register][:] = 0x3C00_3C00
        run("v_mfma_f32_16x16x16f16 a[0:3], v[0:1], v[2:3], 0", w)
        assert (w.f32[FIRST_AGPR] == (0 if flushes else 16 * 2.0**-15)).all()


# -- lanes


def test_a_permutation_takes_what_active_lanes_have() -> None:
    w = wave()
    w.u32[1][:], w.u32[2][:], w.u32[3][:] = 4 * (LANE ^ 17) + 3, LANE + 100, 7
    w.exec = 0xFFFF_FFFF_0000_FFFF
    run("ds_bpermute_b32 v3, v1, v2 \n s_waitcnt lgkmcnt(0)", w)
    active = (LANE < 16) | (LANE >= 32)
    source = LANE ^ 17
    want = np.where((source < 16) | (source >= 32), source + 100, 0)
    assert np.array_equal(w.u32[3], np.where(active, want, 7))


def test_lanes_are_read_and_written_one_by_one() -> None:
    w = wave()
    w.u32[1][:], w.s[9] = LANE * 3, 0xFFFF_FFFF
    w.exec = 0b110000
    text = """v_readlane_b32 s2, v1, 63
              v_writelane_b32 v1, s9, 2
              v_readfirstlane_b32 s3, v1
              s_mov_b64 exec, 0
              v_readfirstlane_b32 s4, v1"""
    run(text, w)
    assert (w.s[2], w.s[3], w.s[4]) == (189, 12, 0)
    assert w.u32[1][2] == 0xFFFF_FFFF


def test_only_active_lanes_are_written() -> None:
    w = wave()
    w.u32[0][:], w.s[4], w.s[5] = 5, 0b1010, 0
    text = """s_and_saveexec_b64 s[6:7], s[4:5]
              v_mov_b32_e32 v0, 9
              v_cmp_eq_u32_e32 vcc, 9, v0
              s_mov_b64 exec, s[6:7]
              v_cndmask_b32_e64 v1, 1, 2, vcc"""
    run(text, w)
    assert w.pair(VCC) == 0b1010
    assert (w.u32[0] == np.where((LANE == 1) | (LANE == 3), 9, 5)).all()
    assert (w.u32[1] == np.where((LANE == 1) | (LANE == 3), 2, 1)).all()


def test_branches() -> None:
    text = """s_mov_b32 s0, 5
              s_mov_b32 s1, 0
              .LBB0_1:
              s_add_i32 s1, s1, s0
              s_sub_u32 s0, s0, 1
              s_cmp_lg_u32 s0, 0
              s_cbranch_scc1 .LBB0_1"""
    assert run(text).s[1] == 15


# -- arithmetic, against numbers of any size


def lanes_of(w: Wave, first: int) -> list[int]:
    """64 bits of each lane."""
    return [int(lo) | int(hi) << 32 for lo, hi in zip(*w.u32[first : first + 2], strict=True)]


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
    pairs = list(zip(a, b, strict=True))
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
        ("v_subrev_u32_e32 v2, 0x12345, v1", lambda a, b: b - 0x12345),
        ("v_xor_b32_e32 v2, -1, v1", lambda a, b: b ^ 0xFFFF_FFFF),
    ],
)
def test_integers(text: str, value: Callable[[int, int], int]) -> None:
    w = wave()
    w.u32[0][:], w.u32[1][:] = integers(), integers()
    w.u32[0][0] = 0
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
              s_orn2_b64 s[18:19], s[0:1], s[2:3]"""
    run(text, w)
    a, b, ones = w.pair(0), w.pair(2), 2**64 - 1
    assert w.pair(4) == (a + b) & ones
    assert w.pair(6) == (a - b) & ones
    assert w.s[8] == (a % 2**32) * (b % 2**32) >> 32
    assert w.pair(10) == ((b - 2**64) >> 8) & ones
    assert w.pair(12) == 0xFFFF_FFFF_FFFF_0000
    assert w.s[14] == 0xFFFF_FF80
    assert w.pair(16) == ones
    assert w.pair(18) == a | (b ^ ones)


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


# -- memory


def words(w: Wave, first: int, count: int) -> NDArray[np.uint32]:
    return np.stack(w.u32[first : first + count], -1)


@pytest.mark.parametrize("late", [False, True])
def test_local_memory(late: bool) -> None:
    w = wave(late)
    w.u32[0][:] = LANE * 16
    for register in range(1, 5):
        w.u32[register][:] = integers()
    text = """ds_write_b128 v0, v[1:4] offset:32
              ds_read_b128 v[5:8], v0 offset:32
              ds_read2_b64 v[9:12], v0 offset0:5 offset1:4
              ds_read_u16 v13, v0 offset:38
              ds_read2st64_b32 v[14:15], v0 offset0:1 offset1:2
              ds_write_b16 v0, v1 offset:2000
              s_waitcnt lgkmcnt(0)"""
    run(text, w)
    given = words(w, 1, 4)
    assert np.array_equal(words(w, 5, 4), given)
    assert np.array_equal(words(w, 9, 4), given[:, [2, 3, 0, 1]])
    assert np.array_equal(w.u32[13], given[:, 1] >> 16)
    flat = given.ravel()
    assert np.array_equal(w.u32[14][:32], flat[(256 - 32) // 4 :: 4][:32])
    assert np.array_equal(w.u32[15][:32], flat[(512 - 32) // 4 :: 4][:32])


@pytest.mark.parametrize("late", [False, True])
def test_global_memory(late: bool) -> None:
    memory, x = Memory(), torch.arange(256, dtype=torch.int32)
    y = torch.zeros(64, 2, dtype=torch.bfloat16)
    memory.allow(x)
    memory.allow(y[:, 1], writable=True)
    w = wave(late, memory=memory)
    w.set_pair(0, x.data_ptr())
    w.u32[0][:] = LANE * 4
    places = np.uint64(y.data_ptr()) + LANE.astype(np.uint64) * np.uint64(4)
    w.u32[2][:], w.u32[3][:] = places.view(np.uint32).reshape(-1, 2).T
    text = """s_load_dwordx4 s[4:7], s[0:1], 0x10
              global_load_dword v1, v0, s[0:1] offset:8
              s_waitcnt vmcnt(0)
              v_mov_b32_e32 v4, 0x3f803f00
              global_store_short_d16_hi v[2:3], v4, off offset:2
              s_waitcnt lgkmcnt(0)"""
    run(text, w)
    assert w.s[4:8] == [4, 5, 6, 7]
    assert np.array_equal(w.u32[1], LANE + 2)
    assert torch.equal(y, torch.tensor([0.0, 1.0]).expand(64, 2))


LOAD = "global_load_dword v1, v0, s[0:1]"


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        f"{LOAD} \n v_add_u32_e32 v2, v1, v1",
        f"{LOAD} \n {LOAD.replace('v1', 'v2')} \n s_waitcnt vmcnt(1) \n v_mov_b32_e32 v3, v2",
        f"{LOAD} \n s_waitcnt lgkmcnt(0) \n v_mov_b32_e32 v1, 0",
        f"{LOAD} \n ds_read_b32 v1, v0",
        "s_load_dword s4, s[0:1], 0x0 \n s_waitcnt lgkmcnt(1) \n s_mov_b32 s5, s4",
        "s_load_dwordx2 vcc, s[0:1], 0x0 \n s_cbranch_vccz .LBB0_1 \n.LBB0_1:",
        "ds_read_b32 v1, v0 \n ds_read_b32 v2, v0 \n s_waitcnt lgkmcnt(1) \n v_mov_b32_e32 v3, v2",
        "ds_bpermute_b32 v1, v0, v0 \n v_mfma_f32_16x16x16_f16 a[0:3], v[0:1], v[2:3], 0",
    ],
)
def test_a_register_that_is_not_waited_for(text: str, late: bool) -> None:
    memory, x = Memory(), torch.zeros(64)
    memory.allow(x)
    w = wave(late, memory=memory)
    w.set_pair(0, x.data_ptr())
    w.u32[0][:] = LANE * 4
    with pytest.raises(Hazard, match="under way"):
        run(text, w)


def test_what_is_waited_for_is_there() -> None:
    w = wave()
    w.u32[0][:] = LANE * 4
    text = """ds_write_b32 v0, v0
              ds_read_b32 v1, v0
              ds_read_b32 v2, v0
              s_waitcnt lgkmcnt(1)
              v_mov_b32_e32 v3, v1"""
    assert np.array_equal(run(text, w).u32[3], LANE * 4)


EXCHANGE = """ds_write_b32 v0, v1
              s_waitcnt lgkmcnt(0)
              s_barrier
              ds_read_b32 v3, v2
              s_waitcnt lgkmcnt(0)"""


def exchanged(text: str, descending: bool) -> bool:
    """Whether two waves see in local memory what the other has written."""
    lds = Lds(512)
    waves = [wave(lds=lds) for _ in range(2)]
    for n, w in enumerate(waves):
        mine, others = 256 * n, 256 * (1 - n)
        w.u32[0][:], w.u32[2][:] = LANE * 4 + mine, LANE * 4 + others
        w.u32[1][:] = LANE + 1000 * n
    run(text, *(waves[::-1] if descending else waves))
    return all(np.array_equal(w.u32[3], LANE + 1000 * (1 - n)) for n, w in enumerate(waves))


@pytest.mark.parametrize("missing", [None, "s_barrier", "s_waitcnt lgkmcnt(0)"])
def test_a_missing_barrier_or_wait_is_seen(missing: str | None) -> None:
    text = EXCHANGE if missing is None else EXCHANGE.replace(missing, "s_nop 0", 1)
    seen = [exchanged(text, descending) for descending in (False, True)]
    assert all(seen) == (missing is None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("global_load_dword v1, v0, s[0:1] offset:4", "of no tensor"),
        ("global_load_dword v1, v0, s[0:1] offset:-4", "of no tensor"),
        ("global_load_dwordx2 v[2:3], v0, s[2:3]", "between the elements"),
        ("global_load_dword v1, v0, s[0:1] offset:2", "not aligned"),
        ("global_store_dword v0, v0, s[0:1]", "may not"),
        ("ds_read_b32 v1, v0 offset:3844", "of LDS"),
        ("ds_read_b64 v[2:3], v0", "not aligned"),
        ("ds_write_b32 v0, v0 offset:3844", "of LDS"),
    ],
)
def test_other_memory_is_refused(text: str, reason: str) -> None:
    memory, x, y = Memory(), torch.zeros(64), torch.zeros(64, 2)
    memory.allow(x)
    memory.allow(y[:, 0])
    w = wave(memory=memory)
    w.set_pair(0, x.data_ptr())
    w.set_pair(2, y.data_ptr())
    w.u32[0][:] = LANE * 4
    with pytest.raises(Hazard, match=reason):
        run(text, w)


def test_lanes_that_are_not_active_touch_nothing() -> None:
    w = wave()
    w.exec = 0
    w.u32[1][:] = 3
    run("global_load_dword v1, v0, s[0:1] \n s_waitcnt vmcnt(0)", w)
    assert (w.u32[1] == 3).all()


def test_a_wave_that_does_not_end() -> None:
    assert STEPS_OF_A_WAVE > 1_000_000
    with pytest.raises(Hazard, match="does not end in 1000 steps"):
        run_waves(program(".LBB0_1:\ns_branch .LBB0_1"), [wave()], steps=1000)


# -- what it does not know


@pytest.mark.parametrize(
    "text",
    [
        "v_dot2_f32_f16 v0, v1, v2, v3",
        "v_mfma_f32_4x4x4f16 a[0:3], v[0:1], v[2:3], 0",
        "v_add_f32_dpp v0, v1, v2 row_shr:1",
        "v_add_f32_e64 v0, v1, v2 clamp",
        "v_add_u32_e32 v0, -v1, v2",
        "v_mov_b32_e32 v0, src_shared_base",
        "global_load_lds_dword v0, s[0:1]",
        "s_waitcnt expcnt(0)",
        "s_setprio 1",
        "ds_swizzle_b32 v0, v1 offset:31",
        "buffer_load_dword v0, v1, s[0:3], 0 idxen",
        "global_atomic_add v0, v1, s[0:1]",
        "v_cmp_class_f32_e32 vcc, v0, v1",
        "v_cvt_f16_f32_sdwa v3, v0 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:DWORD",
    ],
)
def test_the_unknown_is_refused_by_name(text: str) -> None:
    with pytest.raises(Unknown, match=text.split()[0]):
        build(parse_line(text), {})


def test_lines_are_read() -> None:
    instructions, labels = parse_body(
        "name:\n\t; %bb.0:\n\ts_nop 1 ; why\n.LBB0_1:  ; loop\n"
        "\tds_read2_b64 v[0:3], v4 offset0:2 offset1:3\n\t.p2align 8\n"
    )
    assert [(x.name, x.line) for x in instructions] == [("s_nop", 3), ("ds_read2_b64", 5)]
    assert labels == {".LBB0_1": 1}
    assert instructions[1].operands == ("v[0:3]", "v4")
    assert instructions[1].modifiers == {"offset0": "2", "offset1": "3"}
    sdwa: Any = parse_line("v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7] op_sel_hi:[1,0,1]")
    assert sdwa.bits("op_sel_hi", 1) == (1, 0, 1)
