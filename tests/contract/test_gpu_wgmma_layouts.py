"""Where wgmma finds its operands, in registers and in shared memory: csrc/gpu/hopper/layouts.h.

Compared with what Triton 3.9 gives and compiles for the same instructions. A layout is given by its
bases: the position of number 0 plus, for each set bit of an index, one of these.
"""

from __future__ import annotations

import itertools
import shutil

import pytest
from gpu_host import GpuHostOps, host_ops

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

Bases = tuple[tuple[int, int], ...]

# to_linear_layout of NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1]) and of its
# DotOperandLayout(operand_index=0, k_width=2): (row, column) by register and by lane.
LANES: Bases = ((0, 2), (0, 4), (1, 0), (2, 0), (4, 0), (16, 0), (32, 0))
REGISTERS: dict[str, Bases] = {
    "m64nNk16.d": ((0, 1), (8, 0), (0, 8), (0, 16), (0, 32), (0, 64)),
    "m64nNk16.a": ((0, 1), (8, 0), (0, 8)),
}

# to_linear_layout of NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16): (row, column)
# by the number's place in shared memory, for as many rows and panels of 64 columns as there are.
IN_ROW: Bases = ((0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (0, 32))
IN_PANEL: Bases = ((1, 8), (2, 16), (4, 32), (8, 0), (16, 0), (32, 0), (64, 0))
SIZES = tuple(itertools.product((64, 128), repeat=2))

# What Triton 3.9 puts into descriptors of tiles of such sizes, beside the address: (rows, columns)
# of the right operand of tl.dot that lies in memory with its columns contiguous.
TRITON_OVER_ROWS = {
    (64, 128): 4611686293305294848 | 33554432,
    (128, 128): 4611686293305294848 | 67108864,
}
TRITON_OVER_COLUMNS = 4611686293305294848  # of K, transposed
LEADING_OFFSET = 0x3FFF << 16  # has no meaning in one panel, nor where columns are summed over


@pytest.fixture(scope="module")
def ops() -> GpuHostOps:
    return host_ops(32)


def added(bases: Bases, index: int) -> tuple[int, int]:
    taken = [base for bit, base in enumerate(bases) if index >> bit & 1]
    row = column = 0
    for base in taken:
        row, column = row ^ base[0], column ^ base[1]
    return row, column


@pytest.mark.parametrize("name", REGISTERS)
def test_registers_equal_tritons(name: str, ops: GpuHostOps) -> None:
    registers = REGISTERS[name]
    for lane, element in itertools.product(range(128), range(2 ** len(registers))):
        (row, column), (more_rows, more_columns) = added(LANES, lane), added(registers, element)
        want = (row + more_rows, column + more_columns)
        assert ops.layout(name, lane, element) == want


def triton_places(rows: int, dim: int) -> dict[tuple[int, int], int]:
    """Bytes from the start of a tile, of each (row, column)."""
    row_bits, panels = (rows - 1).bit_length(), ((0, 64),) * (dim // 128)
    bases = (*IN_ROW, *IN_PANEL[:row_bits], *panels)
    return {added(bases, index): 2 * index for index in range(rows * dim)}


@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_operands_lie_where_triton_puts_them(rows: int, dim: int, ops: GpuHostOps) -> None:
    places, base = triton_places(rows, dim), 5 * 1024
    assert len(places) == rows * dim
    for step, k, n in itertools.product(range(rows // 16), range(16), range(0, dim, 3)):
        made = ops.tile_descriptor(rows, dim, base, over_rows=True, step=step)
        found = ops.descriptor_address(made, True, k, n)
        assert found == base + places[16 * step + k, n], (step, k, n)
    for step, first in itertools.product(range(dim // 16), range(0, rows, 64)):
        made = ops.tile_descriptor(rows, dim, base, over_rows=False, step=step, row=first)
        for row, k in itertools.product(range(0, 64, 3), range(16)):
            found = ops.descriptor_address(made, False, row, k)
            assert found == base + places[first + row, 16 * step + k], (step, first, row, k)


@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_descriptors_equal_tritons(rows: int, dim: int, ops: GpuHostOps) -> None:
    address = 3 * 1024
    over_columns = ops.tile_descriptor(rows, dim, address, over_rows=False, step=0)
    assert (over_columns ^ TRITON_OVER_COLUMNS) & ~LEADING_OFFSET == address // 16
    over_rows = ops.tile_descriptor(rows, dim, address, over_rows=True, step=0)
    want = TRITON_OVER_ROWS.get((rows, dim), TRITON_OVER_COLUMNS)
    meaning = -1 if (rows, dim) in TRITON_OVER_ROWS else ~LEADING_OFFSET
    assert (over_rows ^ want) & meaning == address // 16
