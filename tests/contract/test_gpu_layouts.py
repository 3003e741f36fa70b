"""Which element of a matrix each register of each lane holds: csrc/gpu/layouts.h."""

from __future__ import annotations

import shutil

import pytest
from gpu_emulated import emulated_ops

pytestmark = [
    pytest.mark.device_code,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

# Position of lane 0's first element plus, for each set bit of the element's and of the lane's
# number, one of these: what Triton 3.9 gives for the same instructions (to_linear_layout of
# NVMMADistributedLayout, AMDMFMALayout and their DotOperandLayouts). Then rows and columns.
LAYOUT_BASES = {
    "m16n8k16.a": ("0,1 8,0 0,8", "0,2 0,4 1,0 2,0 4,0", (16, 16)),
    "m16n8k16.b": ("1,0 8,0", "2,0 4,0 0,1 0,2 0,4", (16, 8)),
    "m16n8k16.c": ("0,1 8,0", "0,2 0,4 1,0 2,0 4,0", (16, 8)),
    "mfma16x16x16.a": ("0,1 0,2", "1,0 2,0 4,0 8,0 0,4 0,8", (16, 16)),
    "mfma16x16x16.b": ("1,0 2,0", "0,1 0,2 0,4 0,8 4,0 8,0", (16, 16)),
    "mfma16x16x16.c": ("1,0 2,0", "0,1 0,2 0,4 0,8 4,0 8,0", (16, 16)),
    "mfma32x32x8.a": ("0,1 0,2", "1,0 2,0 4,0 8,0 16,0 0,4", (32, 8)),
    "mfma32x32x8.b": ("1,0 2,0", "0,1 0,2 0,4 0,8 0,16 4,0", (8, 32)),
    "mfma32x32x8.c": ("1,0 2,0 8,0 16,0", "0,1 0,2 0,4 0,8 0,16 4,0", (32, 32)),
}


def added(bases: str, number: int) -> tuple[int, int]:
    taken = [base.split(",") for bit, base in enumerate(bases.split()) if number >> bit & 1]
    return sum(int(row) for row, _ in taken), sum(int(column) for _, column in taken)


@pytest.mark.parametrize("name", LAYOUT_BASES)
def test_positions_equal_tritons(name: str) -> None:
    elements, lanes, shape = LAYOUT_BASES[name]
    seen = set()
    for lane in range(2 ** len(lanes.split())):
        for element in range(2 ** len(elements.split())):
            by_element, by_lane = added(elements, element), added(lanes, lane)
            want = (by_element[0] + by_lane[0], by_element[1] + by_lane[1])
            assert emulated_ops(32).layout(name, lane, element) == want
            seen.add(want)
    rows, columns = 1 + max(row for row, _ in seen), 1 + max(column for _, column in seen)
    assert (rows, columns) == shape
    assert len(seen) == rows * columns == 2 ** len((elements + " " + lanes).split())


# Lanes of AMD's matrix instruction calculator for v_mfma_f32_32x32x8_f16, the same for its
# bf16 twin, on CDNA2 and CDNA3: element of each register of a lane.
CALCULATED = {
    ("a", 0): "0,0 0,1 0,2 0,3",
    ("a", 37): "5,4 5,5 5,6 5,7",
    ("b", 0): "0,0 1,0 2,0 3,0",
    ("b", 37): "4,5 5,5 6,5 7,5",
    ("c", 1): "0,1 1,1 2,1 3,1 8,1 9,1 10,1 11,1 16,1 17,1 18,1 19,1 24,1 25,1 26,1 27,1",
    ("c", 37): "4,5 5,5 6,5 7,5 12,5 13,5 14,5 15,5 20,5 21,5 22,5 23,5 28,5 29,5 30,5 31,5",
}


@pytest.mark.parametrize(("operand", "lane"), CALCULATED)
def test_positions_equal_amds(operand: str, lane: int) -> None:
    want = [tuple(map(int, at.split(","))) for at in CALCULATED[operand, lane].split()]
    ops = emulated_ops(32)
    got = [ops.layout(f"mfma32x32x8.{operand}", lane, element) for element in range(len(want))]
    assert got == want
