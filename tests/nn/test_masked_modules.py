"""Masks and sinks of the modules: by the oracle, and by torch's module, on a ring of two."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pool as worker
import pytest
import torch
from torch import Tensor, nn

import usp
from usp import masks
from usp.testing import dense_attention

LENGTH = 13
MASK = masks.causal() & (masks.window(3) | masks.first_keys(2))
LAYOUT = "zigzag"


def tensors(count: int, *shape: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=random, dtype=torch.float64) for _ in range(count)]


def shared(x: Tensor) -> Tensor:
    return usp.shard_sequence(x, worker.mesh(1, 2), 1, LAYOUT).requires_grad_()


def joined(x: Tensor) -> Tensor:
    return usp.unshard_sequence(x, worker.mesh(1, 2), 1, LAYOUT, LENGTH)


def attended(call: dict[str, Any]) -> list[list[Tensor]]:
    """Output and gradients, also those of a copy and of a pickle."""
    options = {"mask": MASK, "sinks": nn.Parameter(torch.tensor([0.3, -1.0]).double())}
    module = usp.LongContextAttention(
        worker.mesh(1, 2), layout=LAYOUT, seq_len=LENGTH, query_offset=1, **options
    )
    q, k, v, dout = tensors(4, 2, LENGTH, 2, 5)
    results = []
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        leaves = [shared(x) for x in (q, k, v)]
        out = each(*leaves, **call)
        (sinks,) = each.parameters()
        *gradients, dsinks = torch.autograd.grad(out, [*leaves, sinks], shared(dout).detach())
        torch.distributed.all_reduce(dsinks)  # each rank has its part
        results.append([*(joined(x.detach()) for x in (out, *gradients)), dsinks])
    return results


@pytest.mark.parametrize(
    "call", [{}, {"mask": masks.window(2, 2), "query_offset": 0, "key_lengths": (13, 5)}]
)
def test_long_context_attention_sees_by_its_mask_or_that_of_the_call(pool, call) -> None:
    """fp64, so that copies and every gradient are those of dense attention to 1e-9."""
    mask, offset = call.get("mask", MASK), call.get("query_offset", 1)
    seen = mask.dense(LENGTH + offset, LENGTH)[offset:].expand(2, 1, -1, -1).clone()
    for sample, length in zip(seen, call.get("key_lengths", ()), strict=False):
        sample[..., length:] = False
    q, k, v, dout = tensors(4, 2, LENGTH, 2, 5)
    leaves = [x.requires_grad_() for x in (q, k, v, torch.tensor([0.3, -1.0]).double())]
    out, _ = dense_attention(*leaves[:3], attn_mask=seen, sinks=leaves[3])
    expected = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    for results in pool.run(attended, call, ranks=2):
        for result in results:
            torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def test_an_attn_mask_of_the_call_and_a_mask_of_the_module_both_hide() -> None:
    q, k, v = tensors(3, 2, LENGTH, 2, 5)
    table = torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.6
    out = usp.LongContextAttention(mask=MASK)(q, k, v, attn_mask=table)
    seen = (table & MASK.dense(LENGTH, LENGTH))[None, None]
    expected, _ = dense_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_what_is_learned_is_a_parameter_and_what_is_not_moves_along() -> None:
    learned = usp.LongContextAttention(sinks=nn.Parameter(torch.zeros(2)))
    assert list(learned.state_dict()) == ["sinks"]
    fixed = usp.LongContextAttention(sinks=torch.zeros(2), mask=MASK).double()
    assert not fixed.state_dict() and fixed.sinks.dtype == torch.float64
    assert f"mask={MASK!r}" in repr(fixed) and "query_offset" not in repr(fixed)


def multihead(causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    options = {"layout": LAYOUT, "seq_len": LENGTH, "causal": causal, "mask": _mask(causal)}
    module = nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64)
    ours = usp.MultiheadAttention.from_torch(module, worker.mesh(1, 2), **options)
    x = shared(*tensors(1, 2, LENGTH, 6))
    out, weights = ours(x, x, x)
    (gradient,) = torch.autograd.grad(out.square().sum() + weights.square().sum(), x)
    return joined(out.detach()), joined(weights.detach()), joined(gradient)


def _mask(causal: bool) -> masks.Mask:
    return masks.window(3, 3) | masks.first_keys(2) if causal else MASK


@pytest.mark.parametrize("causal", [False, True])
def test_multihead_output_and_weights_see_by_the_mask(pool, causal: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64)
    mask = _mask(causal) & masks.causal() if causal else MASK
    (x,) = tensors(1, 2, LENGTH, 6)
    x.requires_grad_()
    out, weights = module(x, x, x, attn_mask=~mask.dense(LENGTH, LENGTH))
    (gradient,) = torch.autograd.grad(out.square().sum() + weights.square().sum(), x)
    expected = out.detach(), weights.detach(), gradient
    for result in pool.run(multihead, causal, ranks=2):
        torch.testing.assert_close(tuple(result), expected, rtol=1e-9, atol=1e-9)


def test_multihead_refuses_what_is_no_mask() -> None:
    with pytest.raises(TypeError, match=r"(?s)usp\.masks.*attn_mask"):
        usp.MultiheadAttention(6, 2, mask=torch.ones(3, 3).bool())
    assert f"mask={MASK!r}" in repr(usp.MultiheadAttention(6, 2, mask=MASK))
