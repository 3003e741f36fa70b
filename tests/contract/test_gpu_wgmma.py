"""The kernels of sm_90a on the CPU: wgmma and the TMA of csrc/gpu/hopper, without a GPU.

csrc/gpu/host/hopper.h stands in for the instructions: it finds operands by the descriptors and lane
layouts that NVIDIA documents, and does what runs on by itself at once or as late as it may.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_host import GpuHostOps, host_ops
from native_case import (
    Case,
    computed,
    largest,
    make_inputs,
    new_state,
    options,
    whole_and_in_blocks,
)
from test_gpu_kernels import DTYPES, GUARD, assert_equal_to_oracle, guarded

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

BASE = Case(
    batch=1, lq=131, lk=157, heads=(2, 0, 2), head_dim=64, value_head_dim=64, dtype=torch.float16
)
# When copies are done, and when products: (late, late), ...
ORDERS = tuple(itertools.product((True, False), repeat=2))


@pytest.fixture
def ops() -> Iterator[GpuHostOps]:
    found = host_ops(32)
    found.compute_capability(90)
    found.late(copies=True, products=True)
    yield found
    found.compute_capability(80)
    found.descending_waves(False)


def uses_wgmma(ops: GpuHostOps, case: Case, **changed: Any) -> bool:
    """Judges a case against the oracle; whether wgmma was used in it."""
    before = ops.wgmma_count()
    x = make_inputs(case)
    for name, value in changed.items():
        setattr(x, name, value)
    assert_equal_to_oracle(ops, case, x)
    return ops.wgmma_count() > before


# Intervals of 131 rows that are empty, with a gap between them.
EMPTY = (torch.arange(131) // 64 * 5).int()


TAKEN: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"span": "causal"},
    "strictly_causal": {"span": "strictly_causal", "prior_keys": 1},
    "window": {"span": "window", "batch": 2},
    "documents": {"span": "documents"},
    "gaps": {"span": "gaps"},
    "random": {"span": "random", "prior_keys": 37},
    "one_query": {"lq": 1},
    "one_key": {"lk": 1, "prior_keys": 3},
    "many_steps": {"lq": 150, "lk": 701, "heads": (1, 0, 1)},
    "many_rows": {"lq": 521, "lk": 67, "heads": (1, 0, 1), "span": "causal"},
    "grouped_heads": {"heads": (5, 3, 4), "span": "causal", "batch": 2, "lq": 67, "lk": 71},
    "heads_first": {"layout": "heads_first", "span": "causal", "batch": 2},
    "sliced": {"layout": "sliced", "batch": 2},
}


@pytest.mark.parametrize("option", TAKEN)
def test_equals_dense_attention(option: str, ops: GpuHostOps) -> None:
    assert uses_wgmma(ops, replace(BASE, **TAKEN[option]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_head_dims_and_dtypes(head_dim: int, dtype: torch.dtype, ops: GpuHostOps) -> None:
    dims = {"head_dim": head_dim, "value_head_dim": head_dim}
    case = replace(BASE, dtype=dtype, heads=(3, 1, 2), prior_keys=29, **dims)
    for span in ("causal", "window"):
        assert uses_wgmma(ops, replace(case, span=span))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_any_order_gives_the_same_bits(head_dim: int, ops: GpuHostOps) -> None:
    dims = {"head_dim": head_dim, "value_head_dim": head_dim}
    case = replace(BASE, lq=150, lk=401, heads=(2, 1, 2), span="causal", prior_keys=19, **dims)
    x = make_inputs(case)
    reference = computed(case, x, ops)
    for (copies, products), descending in itertools.product(ORDERS, (False, True)):
        ops.late(copies, products)
        ops.descending_waves(descending)
        for name, result in computed(case, x, ops).items():
            assert torch.equal(result, reference[name]), (name, copies, products, descending)


NOT_TAKEN: dict[str, dict[str, Any]] = {
    "other_head_dim": {"head_dim": 96, "value_head_dim": 96},
    "larger_head_dim": {"head_dim": 192, "value_head_dim": 192},
    "padded_head_dim": {"head_dim": 56, "value_head_dim": 56},
    "unequal_head_dims": {"value_head_dim": 128},
    "bias": {"bias": "11QK"},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi": "1H"},
    "dropout": {"dropout_p": 0.2},
    "expanded": {"layout": "expanded", "batch": 2},
    "no_queries": {"lq": 0},
    "no_keys": {"lk": 0},
}


@pytest.mark.parametrize("option", NOT_TAKEN)
def test_the_other_kernels_take_the_rest(option: str, ops: GpuHostOps) -> None:
    assert not uses_wgmma(ops, replace(BASE, **{"lq": 33, "lk": 35} | NOT_TAKEN[option]))


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("what", ["rows", "address"])
def test_tensors_that_the_tma_cannot_take(name: str, what: str, ops: GpuHostOps) -> None:
    case = replace(BASE, lq=33, lk=35)
    x = getattr(make_inputs(case), name)
    if what == "rows":  # of 8 bytes too many
        wide = torch.full((*x.shape[:3], x.shape[3] + 4), torch.nan, dtype=x.dtype)
        wide[..., : x.shape[3]] = x
        x = wide[..., : x.shape[3]]
    else:
        flat = torch.full((x.numel() + 4,), torch.nan, dtype=x.dtype)
        flat[4:] = x.flatten()
        x = flat[4:].view(x.shape)
    assert uses_wgmma(ops, case, **{name: x}) == (name == "dout")  # the forward pass still may


@pytest.mark.parametrize("capability", [80, 100])
def test_other_devices_run_the_other_kernels(capability: int, ops: GpuHostOps) -> None:
    ops.compute_capability(capability)
    assert not uses_wgmma(ops, replace(BASE, lq=33, lk=35))


def test_a_scale_that_is_not_positive(ops: GpuHostOps) -> None:
    case = replace(BASE, lq=33, lk=35)
    x = make_inputs(case)
    out, lse = new_state(case)
    shared = options(case, x, slice(None), masked=True)
    shared[9] = -0.125
    before = ops.wgmma_count()
    ops.attention_forward(x.q, x.k, x.v, *shared, out, lse)
    assert ops.wgmma_count() == before


@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_lies_around_is_neither_read_nor_written(head_dim: int, ops: GpuHostOps) -> None:
    """Rows past the end are not those of the next head or batch entry: NaN lies there."""
    dims = {"head_dim": head_dim, "value_head_dim": head_dim}
    case = replace(BASE, batch=2, lq=70, lk=67, heads=(3, 1, 2), layout="heads_first", **dims)
    x = make_inputs(case)
    for name in ("q", "k", "v", "dout"):
        tensor = getattr(x, name)
        b, length, heads, dim = tensor.shape
        around = torch.full((b, heads, length + 128, dim), torch.nan, dtype=tensor.dtype)
        around[:, :, :length] = tensor.transpose(1, 2)
        setattr(x, name, around[:, :, :length].transpose(1, 2))
    assert_equal_to_oracle(ops, case, x)

    made = [guarded(state.shape, 0.0) for state in new_state(case)]
    (out, _), (lse, _) = made
    lse.fill_(-torch.inf)
    shared = options(case, x, slice(None), masked=True)
    before = ops.wgmma_count()
    ops.attention_forward(x.q, x.k, x.v, *shared, out, lse)
    grads = [guarded(t.shape, 0.0) for t in (x.q, x.k, x.v)]
    delta, sums = torch.randn(lse.shape), [inside for inside, _ in grads]
    ops.attention_backward(x.dout, x.q, x.k, x.v, delta, lse, *shared, *sums, None)
    assert ops.wgmma_count() > before
    for inside, around in made + grads:
        assert (around == GUARD).sum() == around.numel() - inside.numel()
        assert torch.isfinite(inside).all()
        assert largest(inside) > 0


def test_a_row_that_sees_nothing_keeps_its_state_to_the_bit(ops: GpuHostOps) -> None:
    case = replace(BASE, lq=300)
    x = make_inputs(case)
    x.first = torch.full((case.lq,), 7, dtype=torch.int32)
    x.stop = x.first.clone()
    x.stop[160:] = 50
    out, lse = (torch.randn(state.shape) for state in new_state(case))
    kept = out.clone(), lse.clone()
    shared = options(case, x, slice(None), masked=True)
    before = ops.wgmma_count()
    ops.attention_forward(x.q, x.k, x.v, *shared, out, lse)
    assert ops.wgmma_count() > before
    assert torch.equal(out[:, :160], kept[0][:, :160])
    assert torch.equal(lse[..., :160], kept[1][..., :160])
    assert (lse[..., 160:] != kept[1][..., 160:]).all()


@pytest.mark.parametrize("span", ["gaps", "nothing"])
@pytest.mark.parametrize("prior", [False, True])
def test_a_result_is_the_new_out_rounded(span: str, prior: bool, ops: GpuHostOps) -> None:
    case = replace(BASE, dtype=torch.bfloat16, span="all" if span == "nothing" else span)
    x = make_inputs(case)
    shared = options(case, x, slice(None), masked=True)
    if span == "nothing":
        shared[:2] = [EMPTY] * 2
    out, lse = new_state(case)
    if prior:
        full = options(case, x, slice(None), masked=False)
        ops.attention_forward(x.q, x.k, x.v, *full, out, lse)
    before, kept = out.clone() if prior else None, out.clone()
    # without a state, what lies in lse is not read
    last_lse = lse.clone() if prior else torch.full_like(lse, torch.nan)
    result, around = guarded(out.shape, torch.nan, case.dtype)
    count = ops.wgmma_count()
    ops.attention_forward(x.q, x.k, x.v, *shared, before, last_lse, result)
    assert (ops.wgmma_count() > count) == (span != "nothing")
    ops.attention_forward(x.q, x.k, x.v, *shared, out, lse)
    assert before is None or torch.equal(before, kept)
    assert torch.equal(lse, last_lse)
    assert torch.equal(result, out.to(case.dtype))
    outside = around.numel() - result.numel()
    assert (around == torch.tensor(GUARD, dtype=case.dtype)).sum() == outside


def test_three_blocks_equal_one(ops: GpuHostOps) -> None:
    case = replace(BASE, lk=300)
    x = make_inputs(case)
    whole, parts = whole_and_in_blocks(case, x, ops)
    torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=2e-4)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-6, atol=1e-6)


OVERWRITTEN: dict[str, dict[str, Any]] = {
    "head_dim_64": {},
    "head_dim_128": {"head_dim": 128, "value_head_dim": 128, "heads": (3, 1, 2), "lq": 67},
    "bfloat16": {"dtype": torch.bfloat16, "batch": 2, "span": "causal"},
    "unseen_keys": {"span": "window", "lk": 401},
    "unseeing_rows": {"span": "gaps", "lq": 263, "lk": 67},
    "nothing": {},
}


@pytest.mark.parametrize("option", OVERWRITTEN)
def test_overwritten_gradients_are_the_sums_rounded(option: str, ops: GpuHostOps) -> None:
    case = replace(BASE, **OVERWRITTEN[option])
    x = make_inputs(case)
    lse, delta = torch.randn(2, case.batch, case.heads[0], case.lq)
    shared = options(case, x, slice(None), masked=True)
    if option == "nothing":
        shared[:2] = [EMPTY] * 2
    args = (x.dout, x.q, x.k, x.v, delta, lse + 4, *shared)
    sums = [torch.zeros(t.shape) for t in (x.q, x.k, x.v)]
    ops.attention_backward(*args, *sums, None)
    assert option == "nothing" or all(map(largest, sums))
    for dq_dtype, kv_dtype in itertools.product((case.dtype, torch.float32), repeat=2):
        dtypes = (dq_dtype, kv_dtype, kv_dtype)
        made = [guarded(t.shape, torch.nan, d) for t, d in zip(sums, dtypes, strict=True)]
        before = ops.wgmma_count()
        ops.attention_backward(*args, *(result for result, _ in made), None, True)
        assert ops.wgmma_count() > before
        for (result, around), want in zip(made, sums, strict=True):
            assert torch.equal(result, want.to(result.dtype))
            guard = torch.tensor(GUARD, dtype=result.dtype)
            assert (around == guard).sum() == around.numel() - result.numel()


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
def test_results_that_pairs_cannot_be_written_to(name: str, ops: GpuHostOps) -> None:
    case = replace(BASE, lq=33, lk=35)
    x = make_inputs(case)
    lse, delta = torch.randn(2, case.batch, case.heads[0], case.lq)
    args = (x.dout, x.q, x.k, x.v, delta, lse + 4, *options(case, x, slice(None), masked=True))
    results = {n: torch.empty_like(t) for n, t in (("dq", x.q), ("dk", x.k), ("dv", x.v))}
    like = results[name]
    results[name] = torch.empty(like.numel() + 1, dtype=like.dtype)[1:].view(like.shape)
    before = ops.wgmma_count()
    ops.attention_backward(*args, *results.values(), None, True)
    assert ops.wgmma_count() == before


def test_gradients_are_added(ops: GpuHostOps) -> None:
    case = replace(BASE, lq=67, lk=71)
    x = make_inputs(case)
    out, lse = new_state(case)
    shared = options(case, x, slice(None), masked=True)
    ops.attention_forward(x.q, x.k, x.v, *shared, out, lse)
    delta = (x.dout.float() * out).sum(-1).transpose(1, 2).contiguous()
    once, twice = ([torch.zeros(t.shape) for t in (x.q, x.k, x.v)] for _ in range(2))
    for sums, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            ops.attention_backward(x.dout, x.q, x.k, x.v, delta, lse, *shared, *sums, None)
    for one, two in zip(once, twice, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(two, 2 * one)
