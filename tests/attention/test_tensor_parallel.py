"""Heads that are some of many: ranks of tensor parallelism drop what the whole model does."""

from __future__ import annotations

from typing import Any

import compiling
import pool as worker
import pytest
import torch
from torch import Tensor

import usp
from usp.testing import dropout_multiplier

LENGTH, HEADS, KV_HEADS = 11, 8, 4
SEED = 2**63 + 17
PARTS = [(0, 2), (2, 4), (6, 2)]  # first query head and number of them


def whole() -> list[Tensor]:
    """q, k, v, slopes and a cotangent of all heads."""
    random = torch.Generator().manual_seed(0)
    shapes = [(2, LENGTH, heads, 4) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, dout = (torch.randn(s, generator=random, dtype=torch.float64) for s in shapes)
    return [q, k, v, torch.rand(HEADS, generator=random, dtype=torch.float64), dout]


def attend(given: list[Tensor], mesh: Any, **options: Any) -> list[Tensor]:
    """Output and gradients of this rank's tokens."""
    *sequences, slopes, dout = given
    leaves = [usp.shard_sequence(x, mesh, 1).requires_grad_() for x in sequences]
    out = usp.long_context_attention(
        *leaves,
        mesh,
        causal=True,
        seq_len=LENGTH,
        dropout_p=0.4,
        dropout_seed=SEED,
        alibi_slopes=slopes,
        **options,
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, usp.shard_sequence(dout, mesh, 1))]


def differences(meshes: tuple[int, int] | None, backend: str) -> list[float]:
    """Of each part to the same heads of the whole: heads in groups of two that share a key head."""
    mesh = None if meshes is None else worker.mesh(*meshes)
    q, k, v, slopes, dout = whole()
    wanted, found = attend([q, k, v, slopes, dout], mesh, backend=backend), []
    for first, count in PARTS:
        own, kv = slice(first, first + count), slice(first // 2, (first + count) // 2)
        given = [q[:, :, own], k[:, :, kv], v[:, :, kv], slopes[own], dout[:, :, own]]
        parts = attend(given, mesh, backend=backend, heads=(first, HEADS))
        for part, all_heads, place in zip(parts, wanted, (own, own, kv, kv), strict=True):
            found.append(float((part - all_heads[:, :, place]).abs().max()))
    return found


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("meshes", [None, (2, 2), (4, 1)])
def test_parts_are_those_of_the_whole(pool, meshes: tuple[int, int] | None, backend: str) -> None:
    if usp.backends()[backend] != "can run here":
        pytest.skip(usp.backends()[backend])
    ranks = meshes[0] * meshes[1] if meshes else 1
    for found in pool.run(differences, meshes, backend, ranks=ranks):
        assert max(found) < 1e-12


def test_in_a_graph() -> None:
    q, k, v, *_ = whole()
    module = usp.LongContextAttention(dropout_p=0.4, heads=(4, HEADS))
    with compiling.afresh():
        fast = torch.compile(module, fullgraph=True, backend="aot_eager")
        results = []
        for function in (module, fast):
            torch.manual_seed(0)
            results.append(function(q[:, :, :4], k[:, :, :2], v[:, :, :2]))
    assert torch.equal(*results)


@pytest.mark.parametrize("first", [0, 2])
def test_multihead_attention(first: int) -> None:
    """The dropped weights and the output drop alike."""
    torch.manual_seed(first)
    module = usp.MultiheadAttention(8, 2, 0.4, batch_first=True, heads=(first, 4)).double()
    x = torch.randn(2, LENGTH, 8, dtype=torch.float64)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(1)
    out, weights = module(x, x, x, average_attn_weights=False)
    keep = dropout_multiplier(0.4, seed, 2, 4, LENGTH, LENGTH)[:, first : first + 2]
    assert torch.equal(weights != 0, keep != 0)
    v = torch.nn.functional.linear(x, module.in_proj_weight[16:], module.in_proj_bias[16:])
    heads = weights @ v.unflatten(2, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(out, module.out_proj(heads.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((1, 8), "query heads share a key head here"),
        ((6, 8), "4 heads from 6 on are more than 8 in all"),
        (4, "heads must be a pair"),
        ((-2, 8), "heads must be 0 or more"),
    ],
)
def test_refusals(heads: Any, message: str) -> None:
    q, k, v, *_ = whole()
    with pytest.raises(ValueError, match=message):
        usp.long_context_attention(q[:, :, :4], k[:, :, :2], v[:, :, :2], heads=heads)


def disagreeing() -> None:
    mesh = worker.mesh(2, 2)
    q = torch.randn(1, 2, 4, 2)
    usp.long_context_attention(q, q, q, mesh, heads=(4 * (mesh.rank == 2), 8))


def test_all_ranks_of_a_mesh_have_the_same_heads(pool) -> None:
    with pytest.raises(worker.RemoteError, match="disagree on heads"):
        pool.run(disagreeing, ranks=4)
