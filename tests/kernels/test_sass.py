"""Loops are found in machine code, wherever the compiler has put them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from programs import module
from sass import blocks, functions, local_accesses, loops, main_loop, opcodes

# A loop of two blocks, one of which lies behind the end; and what is before and after.
TEXT = """
        /*0000*/                   STL [R1], R3 ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0030*/               @P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/                   LDL.LU R3, [R1] ;
        /*0050*/                   EXIT ;
.L_x_3:
        /*0060*/                   MUFU.EX2 R5, R4 ;
        /*0070*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*0080*/                   BRA `(.L_x_4);
"""
LOOP = ["HGMMA.64x64x16.F32.BF16", "BRA", "MUFU.EX2", "BRA"]


def test_a_loop_is_what_comes_back_to_itself() -> None:
    assert [opcodes(loop) for loop in loops(blocks(TEXT))] == [LOOP, ["BRA"]]


def test_spills_count_in_loops_alone() -> None:
    assert local_accesses(TEXT) == 0
    assert local_accesses(TEXT.replace("MUFU.EX2 R5, R4", "LDL.64 R4, [R1+0x8]")) == 1


def test_a_jump_to_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="where it jumps"):
        blocks("        /*0000*/                   BRX R4 -0x10 ;\n")


NESTED = """
	.section	.text.one,"ax"
.L_dispatch:
        /*0000*/               @P0 BRA `(.L_end) ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
.L_loop:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/               @P1 BRA `(.L_whole) ;
        /*0040*/                   ISETP.GE P2, R1, R2 ;
        /*0050*/                   FSEL R5, R4, R6, P2 ;
.L_whole:
        /*0060*/               @P3 BRA `(.L_last) ;
        /*0070*/                   LDGSTS.E.128 [R1], [R2] ;
.L_last:
        /*0080*/              @!P4 BRA `(.L_loop) ;
        /*0090*/                   BRA `(.L_dispatch) ;
.L_end:
        /*00a0*/                   EXIT ;
	.section	.text.two,"ax"
        /*0000*/                   EXIT ;
"""


def test_a_round_of_whole_tiles_has_no_mask_and_loads_the_next() -> None:
    """Inside of a loop that multiplies once more, over a mask, and through the copies."""
    line = next(line for line in NESTED.splitlines() if "/*0020*/" in line)
    one, two = functions(NESTED.replace(line, "\n".join([line] * 40))).values()
    found = [opcode.partition(".")[0] for opcode, _ in main_loop(one)]
    assert found == ["HMMA"] * 40 + ["BRA", "BRA", "LDGSTS", "BRA"]
    assert "EXIT" in two and "HMMA" not in two


AMD = """
\ts_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; in a loop
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\tv_exp_f32_e32 v4, v4
\ts_cbranch_scc0 .LBB0_1
; %bb.2:
\tv_exp_f32_e32 v5, v5
.LBB0_3:
\ts_endpgm
"""


def test_the_cycles_of_a_loop() -> None:
    model = module("_machine_code")
    code = main_loop(TEXT)
    assert model.counts(code) == {"all": 4, "exp": 1, "matrix": 1, "other": 2}
    # 64 x 64 x 16 multiply-adds of four quarters at 512 a clock each; both operands are read
    assert model.cycles("cuda:90", code)["matrix"] == 32
    assert model.cycles("cuda:90", code)["shared"] == 2 * 64 * 16 * 2 / 128
    waves = main_loop(AMD)
    assert model.cycles("hip:gfx942", waves) == {"matrix": 32, "exp": 16, "issue": 24}
    assert model.cycles("hip:gfx90a", waves)["matrix"] == 64
    assert model.bound(model.cycles("hip:gfx942", waves)) == ("matrix", 1)
