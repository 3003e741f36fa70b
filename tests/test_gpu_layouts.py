"""Which element of a matrix each register of each lane holds: csrc/gpu/layouts.h."""

from __future__ import annotations

import shutil

import pytest
from gpu_host import host_ops

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# Position of lane 0's first element plus, for each set bit of the element's and of the lane's
# number, one of these: what Triton 3.9 gives for the same instructions (to_linear_layout of
# NVMMADistributedLayout, AMDMFMALayout and their DotOperandLayouts).
LAYOUT_BASES = {
    "m16n8k16.a": ("01 80 08", "02 04 10 20 40"),
    "m16n8k16.b": ("10 80", "20 40 01 02 04"),
    "m16n8k16.c": ("01 80", "02 04 10 20 40"),
    "mfma16x16x16.a": ("01 02", "10 20 40 80 04 08"),
    "mfma16x16x16.b": ("10 20", "01 02 04 08 40 80"),
    "mfma16x16x16.c": ("10 20", "01 02 04 08 40 80"),
}


def added(bases: str, number: int) -> tuple[int, int]:
    taken = [base for bit, base in enumerate(bases.split()) if number >> bit & 1]
    return sum(int(base[0]) for base in taken), sum(int(base[1]) for base in taken)


@pytest.mark.parametrize("name", LAYOUT_BASES)
def test_positions_equal_tritons(name: str) -> None:
    elements, lanes = LAYOUT_BASES[name]
    seen = set()
    for lane in range(2 ** len(lanes.split())):
        for element in range(2 ** len(elements.split())):
            by_element, by_lane = added(elements, element), added(lanes, lane)
            want = (by_element[0] + by_lane[0], by_element[1] + by_lane[1])
            assert host_ops(32).layout(name, lane, element) == want
            seen.add(want)
    rows, columns = 1 + max(row for row, _ in seen), 1 + max(column for _, column in seen)
    assert (rows, columns) == (16, 8 if name in ("m16n8k16.b", "m16n8k16.c") else 16)
    assert len(seen) == rows * columns == 2 ** len((elements + " " + lanes).split())
