"""What the PTX interpreter knows of sm_90a, by the PTX ISA's own tables and examples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ptx import hopper  # noqa: F401  (fills the table)
from ptx.mbarrier import BarrierError, Barriers
from ptx.tensor_map import TensorMap, unpacked
from ptx.wgmma import Descriptor, left_fragment, sum_fragment, widened
from ptx_programs import run

# 2 rows of 3 heads, wider than a box, 16 bytes further apart than they must be
TENSOR = TensorMap(4096, (72, 2, 3), (160, 320), (64, 4, 1), 128)


def descriptor(start: int, leading: int, stride: int, mode: int) -> int:
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | mode << 62


def test_a_descriptor_is_taken_apart() -> None:
    found = Descriptor.decode(descriptor(0x2400, 0x1000, 0x400, 1))
    assert found == Descriptor(0x2400, 0x1000, 0x400, 128)
    assert Descriptor.decode(0xC000004000010000).row == 32


@pytest.mark.parametrize("bits", [1 << 14, 1 << 30, 1 << 46, 1 << 49, 1 << 52, 1 << 61])
def test_bits_without_a_meaning_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="matrix descriptor"):
        Descriptor.decode(descriptor(1024, 16, 1024, 1) | bits)


@pytest.mark.parametrize(("mode", "start"), [(1, 1024 + 128), (1, 512), (2, 256), (3, 128)])
def test_a_pattern_starts_at_its_boundary(mode: int, start: int) -> None:
    with pytest.raises(ValueError, match="pattern"):
        Descriptor.decode(descriptor(start, 16, 1024, mode))


# Of number (m or n, k) its offset, where the leading dimension's is 4096 and the other one that of
# eight rows of the pattern. "Shared Memory Matrix Layout", the figures of each mode: a 16-byte
# chunk of a row is moved by the row's number, as far as a row has chunks.
K_MAJOR = {
    0: {(1, 0): 16, (0, 7): 14, (0, 8): 4096, (8, 0): 128, (9, 9): 4096 + 128 + 16 + 2},
    1: {(1, 0): 128 + 16, (7, 8): 7 * 128 + 6 * 16, (8, 0): 1024, (9, 3): 1152 + 22},
    2: {(1, 0): 64, (2, 0): 128 + 16, (7, 8): 448 + 2 * 16, (8, 1): 512 + 2},
    3: {(3, 0): 96, (4, 0): 128 + 16, (4, 8): 128, (8, 1): 256 + 2},
}
MN_MAJOR = {
    0: {(1, 0): 2, (0, 1): 16, (8, 0): 128, (0, 8): 4096, (9, 9): 4096 + 128 + 16 + 2},
    1: {(1, 0): 2, (8, 1): 128, (0, 1): 128 + 16, (64, 0): 4096, (0, 8): 1024, (63, 7): 896 + 14},
    2: {(1, 0): 2, (0, 1): 64, (0, 2): 128 + 16, (32, 0): 4096, (0, 8): 512},
    3: {(1, 0): 2, (0, 1): 32, (0, 4): 128 + 16, (16, 0): 4096, (0, 8): 256},
}
EIGHT_ROWS = {0: 128, 1: 1024, 2: 512, 3: 256}


@pytest.mark.parametrize("mode", EIGHT_ROWS)
@pytest.mark.parametrize("mn_major", [False, True])
def test_where_numbers_of_a_matrix_lie(mode: int, mn_major: bool) -> None:
    matrix = Descriptor.decode(descriptor(8192, 4096, EIGHT_ROWS[mode], mode))
    found = matrix.addresses(128, mn_major)
    assert found[0, 0] == 8192 and len(set(found.ravel())) == found.size
    for at, offset in (MN_MAJOR if mn_major else K_MAJOR)[mode].items():
        assert found[at] == 8192 + offset, at


def test_the_next_16_numbers_of_k_are_two_chunks_on() -> None:
    whole = TENSOR.target(8192).reshape(4, 64)
    for step in range(4):
        matrix = Descriptor.decode(descriptor(8192 + 32 * step, 16, 1024, 1))
        found = matrix.addresses(8, mn_major=False)
        assert np.array_equal(found[:4], whole[:, 16 * step : 16 * step + 16])


def test_fragments() -> None:
    """Figures "WGMMA .m64nNk16 register fragment layout for matrix A" and "... D"."""
    row, column = left_fragment()
    assert row[5].tolist() == [1, 1, 9, 9] * 2
    assert column[5].tolist() == [2, 3, 2, 3, 10, 11, 10, 11]
    assert len(set((16 * row + column).ravel())) == row.size == 64 * 16
    row, column = sum_fragment(128)
    assert row[38, :6].tolist() == [17, 17, 25, 25, 17, 17]
    assert column[38, :6].tolist() == [4, 5, 4, 5, 12, 13]
    assert (row[127, -1], column[127, -1]) == (63, 127)
    assert len(set((128 * row + column).ravel())) == row.size == 64 * 128


def test_16_bit_numbers() -> None:
    values = np.array([1.0, -2.5, 0.15625, -0.0], np.float32)
    assert np.array_equal(widened((values.view(np.uint32) >> 16).astype(np.uint16), "bf16"), values)
    assert np.array_equal(widened(values.astype(np.float16).view(np.uint16), "f16"), values)


def test_a_box_is_of_one_head_and_zero_beyond() -> None:
    address, inside = TENSOR.source((32, -1, 2))
    assert address.shape == inside.shape == (1, 4, 64)
    assert address[0, 1, 0] == 4096 + 2 * 320 + 32 * 2
    assert inside[0, :, :40].any(axis=1).tolist() == [False, True, True, False]
    assert not inside[0, :, 40:].any()
    assert not TENSOR.source((0, 0, 3))[1].any()


def test_a_box_is_swizzled_by_its_address() -> None:
    found = TENSOR.target(1024 + 256)[0]
    assert found[0, 0] == 1280 + 2 * 16 and found[1, 0] == 1408 + 3 * 16
    assert replace(TENSOR, row=16).target(1280).ravel().tolist() == [*range(1280, 1280 + 512, 2)]
    with pytest.raises(ValueError, match="128"):
        TENSOR.target(1024 + 64)


def test_a_tensor_map_is_a_parameter() -> None:
    assert unpacked(TENSOR.packed()) == TENSOR and len(TENSOR.packed()) == 128


ILLEGAL: dict[str, dict[str, Any]] = {
    "address": {"base": 4104},
    "strides": {"strides": (168, 320)},
    "sizes": {"sizes": (72, 0, 3)},
    "box": {"box": (64, 257, 1)},
    "box row": {"box": (72, 4, 1)},
}


@pytest.mark.parametrize("what", ILLEGAL)
def test_what_the_driver_would_refuse(what: str) -> None:
    with pytest.raises(ValueError, match=what):
        replace(TENSOR, **ILLEGAL[what])


def test_a_barrier_counts_arrivals_and_bytes() -> None:
    barriers = Barriers()
    barriers.init(64, 2)
    barrier = barriers[64]
    assert barrier.passed(1) and not barrier.passed(0)
    barrier.expect(256)
    barrier.arrive()
    barrier.arrive()
    assert not barrier.passed(0) and not barriers.idle()
    barrier.complete(256)
    assert barrier.passed(0) and not barrier.passed(1) and barriers.idle()
    barrier.complete(128)  # bytes may come before they are expected
    barrier.expect(128)
    barrier.arrive(2)
    assert barrier.passed(1)


def test_misused_barriers() -> None:
    barriers = Barriers()
    barriers.init(64, 1)
    with pytest.raises(BarrierError, match="set up"):
        barriers[72]
    with pytest.raises(BarrierError, match="8"):
        barriers.init(68, 1)
    barriers[64].expect(16)
    barriers[64].arrive()
    with pytest.raises(BarrierError, match="too many"):
        barriers[64].arrive()


# -- instructions that Triton's kernels and those of sm_90a have beyond nvcc's for sm_80

LANES = np.arange(32, dtype=np.int32)[:, None]


def test_reductions_of_a_warp() -> None:
    given = (LANES * 37 + 11) % 64 - 30
    body = """
      ld.global.u32 %r1, [%rd20];
      redux.sync.min.s32 %r2, %r1, -1;
      redux.sync.max.s32 %r3, %r1, -1;
      st.global.v2.b32 [%rd21], {%r2, %r3};
    """
    found = run(body, given, np.int32, count=2)
    assert np.array_equal(found, np.broadcast_to([given.min(), given.max()], (32, 2)))


def test_bits_and_bytes_are_put_together() -> None:
    body = """
      bfi.b32 %r1, 0x2B, 0xFFFF0000, 4, 8;
      mov.b32 %r5, 0x80C0FFEE;
      prmt.b32 %r2, %r5, 0x11223344, 0x4071;
      prmt.b32 %r3, %r5, 0, 0x7B01;
      st.global.b32 [%rd21], %r1;
      st.global.b32 [%rd21+4], %r2;
      st.global.b32 [%rd21+8], %r3;
    """
    found = run(body, LANES, np.uint32, count=3)
    # byte 7 of {b, a} is 0x11; nibble 0xB is the sign of byte 3, which is set
    assert [hex(x) for x in found[0]] == ["0xffff02b0", "0x44ee11ff", "0xffeeff"]


def test_a_branch_by_a_table() -> None:
    body = """
      and.b32 %r1, %r60, 1;
      LIST: .branchtargets EVEN, ODD;
      brx.idx %r1, LIST;
      EVEN: mov.b32 %r2, 10;
      bra.uni DONE;
      ODD: mov.b32 %r2, 11;
      DONE: st.global.b32 [%rd21], %r2;
    """
    found = run(body, LANES, np.int32)
    assert np.array_equal(found[:, 0], 10 + LANES[:, 0] % 2)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_stored_as_they_are_loaded(transposed: bool) -> None:
    """Row r of a matrix is what lane r says; the numbers of lanes 4r to 4r + 3 lie in it."""
    trans = ".trans" * transposed
    body = f"""
      shl.b32 %r1, %r60, 4;
      mov.u32 %r2, memory;
      add.u32 %r1, %r1, %r2;
      ld.global.v2.b32 {{%r3, %r4}}, [%rd20];
      stmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 [%r1], {{%r3, %r4}};
      bar.warp.sync -1;
      shl.b32 %r5, %r60, 3;
      add.u32 %r5, %r5, %r2;
      ld.shared.v2.b32 {{%r6, %r7}}, [%r5];
      st.global.v2.b32 [%rd21], {{%r6, %r7}};
    """
    given = np.arange(128, dtype=np.uint16).reshape(32, 2, 2)  # lane, matrix, number of a pair
    matrices = given.swapaxes(0, 1).reshape(2, 8, 8)
    wanted = matrices.swapaxes(1, 2) if transposed else matrices
    found = run(body, given.reshape(32, 4), np.uint16, count=4, shared_bytes=512)
    assert np.array_equal(found.reshape(2, 8, 8), wanted)
