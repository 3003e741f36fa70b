"""Which keys the kernels of sm_90a bring and multiply, on the CPU as in test_gpu_wgmma.py."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from gpu_host import GpuHostOps, host_ops
from native_case import Case, Inputs, computed, make_inputs, new_state, options
from test_gpu_kernels import assert_equal_to_oracle

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

BASE = Case(
    batch=1, lq=131, lk=157, heads=(1, 0, 1), head_dim=64, value_head_dim=64, dtype=torch.float16
)


@pytest.fixture
def ops() -> Iterator[GpuHostOps]:
    found = host_ops(32)
    found.compute_capability(90)
    found.late(copies=True, products=True)
    yield found
    found.compute_capability(80)


@pytest.mark.parametrize("last", [29, 128, 301])
def test_keys_behind_the_last_that_is_seen_are_not_read(last: int, ops: GpuHostOps) -> None:
    """Each stands behind its block's last key, in memory that was never written."""
    case = replace(BASE, lk=353)
    x = make_inputs(case)
    x.first = torch.zeros(case.lq, dtype=torch.int32)
    x.stop = torch.full_like(x.first, last)
    assert_equal_to_oracle(ops, case, x)
    want = computed(case, x, ops)
    x.k[:, last:] = x.v[:, last:] = torch.nan
    before = ops.wgmma_count()
    got = computed(case, x, ops)
    assert ops.wgmma_count() > before
    for name in ("out", "lse", "dq"):
        assert torch.equal(got[name], want[name]), name
    for name in ("dk", "dv"):
        assert torch.equal(got[name][:, :last], want[name][:, :last]), name


def steps_over_keys(x: Inputs, tile: int, size: int) -> tuple[int, int]:
    """Of all blocks of rows: those in which a row sees a key, and those from end to end."""
    assert x.first is not None and x.stop is not None
    seen = walked = 0
    for first, stop in zip(x.first.split(tile), x.stop.split(tile), strict=True):
        for key in range(int(first[0]), int(stop[-1]), size):
            walked += 1
            seen += bool(((first < key + size) & (stop > key) & (first < stop)).any())
    return seen, walked


def steps_over_rows(x: Inputs, tile: int, size: int) -> int:
    """Of all blocks of keys: from the first row that sees one of them to the last."""
    assert x.first is not None and x.stop is not None
    walked = 0
    for key in range(0, x.k.shape[1], tile):
        rows = ((x.first < key + tile) & (x.stop > key)).nonzero()
        walked += -(-int(rows.max() - rows.min() + 1) // size) if len(rows) else 0
    return walked


@pytest.mark.parametrize("span", ["gaps", "three_runs", "window"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_steps_in_gaps_are_passed_over(span: str, head_dim: int, ops: GpuHostOps) -> None:
    dims = {"head_dim": head_dim, "value_head_dim": head_dim}
    case = replace(BASE, lk=1009, span="all" if span == "three_runs" else span, **dims)
    x = make_inputs(case)
    if span == "three_runs":
        x.first = (torch.arange(case.lq) // 3 + torch.arange(case.lq) // 43 * 301).int()
        x.stop = x.first + 5
    assert_equal_to_oracle(ops, case, x)

    out, lse = new_state(case)
    shared = options(case, x, slice(None), masked=True)
    before = ops.wgmma_count()
    ops.attention_forward(x.q, x.k, x.v, *shared, out, lse)
    forward = ops.wgmma_count() - before
    sums = [torch.zeros(t.shape) for t in (x.q, x.k, x.v)]
    ops.attention_backward(x.dout, x.q, x.k, x.v, torch.zeros_like(lse), lse, *shared, *sums, None)
    backward = ops.wgmma_count() - before - forward

    (seen, walked), (fine, _) = steps_over_keys(x, 128, 128), steps_over_keys(x, 128, 64)
    assert (seen < walked) == (span != "window")
    # each of two warpgroups: 64 rows, and 16 of what is summed over, by one wgmma
    over_dim, over_keys, over_rows = head_dim // 16, 128 // 16, 64 // 16
    assert forward == 2 * seen * (over_dim + over_keys)
    dq = 2 * fine * (2 * over_dim + over_rows)
    assert backward == dq + 2 * steps_over_rows(x, 128, 64) * (2 * over_dim + 2 * over_rows)
