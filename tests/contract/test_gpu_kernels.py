"""The GPU kernels' own sources on the CPU: what is theirs beside the contract."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from gpu_emulated import BlockOrder, GpuEmulatedOps, emulated_ops
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_call import computed, expected, largest, make_inputs, new_state, options
from subjects.gpu_emulated import SUBJECTS, TOLERANCE, WAVES

pytestmark = [
    pytest.mark.device_code,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]
SMALL = SUBJECTS[0].base


@pytest.fixture(params=WAVES)
def ops(request: pytest.FixtureRequest) -> GpuEmulatedOps:
    return emulated_ops(WAVES[request.param])


@given(st.data())
@settings(max_examples=200)
def test_tiles_of_sequences_that_fit_a_cache_start_in_turn(data: st.DataObject) -> None:
    """Whatever a launch begins with; which tile is long is the kernels' to say."""
    tiles, heads, batch = (data.draw(st.integers(1, most)) for most in (7, 9, 5))
    first = data.draw(st.integers(0, heads * batch - 1))
    sequences = data.draw(st.integers(1, heads * batch - first))
    together = data.draw(st.integers(1, sequences))
    order = BlockOrder(tiles, heads, together, sequences, *divmod(first, heads))
    ops = emulated_ops(WAVES["warps_of_32"])
    here = range(first, first + sequences)
    groups = [here[i : i + together] for i in range(0, sequences, together)]
    assert [ops.place(order, index) for index in range(tiles * sequences)] == [
        (*divmod(sequence, heads), tile)
        for group in groups
        for tile in range(tiles)
        for sequence in group
    ]


def test_launches_begin_with_the_longest_tiles(ops: GpuEmulatedOps) -> None:
    """Causal: of queries the last tile sees most, of keys the first is seen by most."""
    case = replace(SMALL, batch=2, lq=300, lk=300, heads=(2, 0, 1), span="causal")
    x = make_inputs(case)
    call = options(case, x, slice(None), masked=True)
    written = {name: torch.full_like(x.q, torch.nan) for name in ("out", "dq", "dk", "dv")}
    zeros = torch.zeros(2, 2, 300)
    with ops.first_blocks(2 * 2):  # a tile of each head
        ops.attention_forward(x.q, x.k, x.v, *call, None, zeros.clone(), written["out"])
        gradients = (written["dq"], written["dk"], written["dv"], None, True)
        ops.attention_backward(x.dout, x.q, x.k, x.v, zeros, zeros, *call, *gradients)
    for name, tensor in written.items():
        rows = tensor.isfinite().all(3).nonzero()[:, 1].unique().tolist()
        assert 0 < len(rows) < 300 and not tensor.isfinite().all(3)[:, rows].logical_not().any()
        at_end = name in ("out", "dq")
        assert rows == list(range(300 - len(rows), 300) if at_end else range(len(rows))), name


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_tiles_in_a_gap_are_not_computed(
    softcap: float, head_dim: int, ops: GpuEmulatedOps
) -> None:
    """Packed documents out of order: rows of one tile see keys far apart, and NaN between them."""
    case = replace(SMALL, lq=70, lk=1009, head_dim=head_dim, value_head_dim=head_dim)
    case = replace(case, heads=(2, 0, 2), softcap=softcap)
    x = make_inputs(case)
    starts = torch.tensor([0, 300, 301, 960]).int()
    x.first = starts.repeat_interleave(torch.tensor([20, 10, 3, 37]))
    x.stop = x.first + 29
    gaps = [slice(93, 236), slice(394, 896)]  # a tile away from what is seen
    for gap in gaps:
        x.k[:, gap], x.v[:, gap] = torch.nan, torch.nan
    got = computed(case, x, ops)
    for gap in gaps:
        x.k[:, gap], x.v[:, gap] = 0, 0
    for name, reference in expected(case, x).items():
        scale = max(1.0, largest(reference))
        assert largest(got[name].double() - reference) <= TOLERANCE[case.dtype] * scale, name


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_a_nan_takes_its_whole_row_alone(bits: int, ops: GpuEmulatedOps) -> None:
    """Also one that rounding to bf16 without care would make 0: all of its fraction is ones."""
    case = replace(SMALL, bias="11QK", dtype=torch.bfloat16)
    x, state = make_inputs(case), new_state(case)
    x.bias[..., 5, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    ops.attention_forward(x.q, x.k, x.v, *options(case, x, slice(None), masked=True), *state)
    out, lse = state
    assert out[:, 5].isnan().all() and lse[..., 5].isnan().all()
    others = torch.arange(case.lq) != 5
    assert out[:, others].isfinite().all() and lse[..., others].isfinite().all()
