"""Loops are found in machine code, wherever the compiler has put them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from sass import blocks, local_accesses, loops, opcodes

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
