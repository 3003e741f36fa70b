"""The interpreter of AMD's machine code: matrices, lanes, branches, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gcn.assembly import Unknown, parse_body, parse_line
from gcn.machine import build
from gcn.wave import FIRST_AGPR, LANES, VCC
from gcn_text import LANE, RANDOM, numbers, run, wave
from numpy.typing import NDArray

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


@pytest.mark.parametrize(
    ("control", "source"),
    [
        ("quad_perm:[1,0,3,2]", LANE ^ 1),
        ("row_mirror", LANE ^ 15),
        ("row_half_mirror", LANE ^ 7),
        ("row_ror:3", LANE // 16 * 16 + (LANE - 3) % 16),
        ("row_shr:5", np.where(LANE % 16 >= 5, LANE - 5, -1)),
        ("row_shl:5", np.where(LANE % 16 < 11, LANE + 5, -1)),
        ("row_bcast:15", np.where(LANE >= 16, LANE // 16 * 16 - 1, -1)),
        ("row_bcast:31", np.where(LANE >= 32, 31, -1)),
    ],
)
def test_lanes_of_a_row(control: str, source: NDArray[np.int64]) -> None:
    for bound in (" bound_ctrl:1", ""):
        w = wave()
        w.u32[0][:], w.u32[1][:], w.u32[2][:] = LANE + 100, 1000, 7
        w.exec = ~(1 << 20) % 2**64
        run(f"v_add_u32_dpp v2, v0, v1 {control} row_mask:0xb bank_mask:0xe{bound}", w)
        there = (source >= 0) & (source != 20)
        written = (LANE != 20) & (LANE // 16 != 2) & (LANE % 16 >= 4) & (there | bool(bound))
        moved = np.where(there, source + 100, 0) + 1000
        assert np.array_equal(w.u32[2], np.where(written, moved, 7))


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
