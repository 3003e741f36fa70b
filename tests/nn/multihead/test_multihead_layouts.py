"""Queries and keys that lie differently: text that one rank holds, latents, caches."""

from __future__ import annotations

from typing import Any

import pool as worker
import pytest
import torch
from torch import Tensor, nn

import usp

QUERIES, KEYS = 13, 7
HELD = usp.Held((0, 7, 0, 0))
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def inputs() -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    sizes = (2, QUERIES, 6), (2, KEYS, 6)
    found = [torch.randn(size, generator=random, dtype=torch.float64) for size in sizes]
    return [*found, torch.rand(2, KEYS, generator=random) < 0.3]


def module(**options: object) -> usp.MultiheadAttention:
    torch.manual_seed(5)
    kind = usp.MultiheadAttention if options else nn.MultiheadAttention
    return kind(6, 3, batch_first=True, add_bias_kv=True, dtype=torch.float64, **options)


def run(
    shape: tuple[int, int], seq_len: tuple[int, int] | None, pieces: dict[str, Any]
) -> list[Tensor]:
    """Results and gradients of this rank's part of the loss; those of inputs are of the whole."""
    mesh, layouts = worker.mesh(*shape), ("zigzag", HELD)
    ours = module(mesh=mesh, layout=layouts, seq_len=seq_len, **pieces)
    query, key, padding = inputs()
    query, key = query.requires_grad_(), key.requires_grad_()
    mine, keys = (
        usp.shard_sequence(x, mesh, 1, layout)
        for x, layout in zip((query, key), layouts, strict=True)
    )
    hidden = usp.shard_sequence(padding, mesh, 1, HELD)
    out, weights = ours(mine, keys, keys, hidden)
    gradients = torch.autograd.grad(
        out.pow(3).sum() + weights.pow(2).sum(), [query, key, *ours.parameters()]
    )
    whole = [usp.unshard_sequence(x, mesh, 1, "zigzag").detach() for x in (out, weights)]
    return [*whole, *gradients]


PIECES = {"chunks": 3, "head_chunks": 2, "offload": "cpu"}


@pytest.mark.parametrize("seq_len", [None, (QUERIES, KEYS)])
@pytest.mark.parametrize(
    ("shape", "pieces"), [((4, 1), {}), ((2, 2), {}), ((1, 4), {}), ((2, 2), PIECES)], ids=str
)
def test_layouts_of_queries_and_of_keys(
    pool, shape: tuple, pieces: dict, seq_len: tuple | None
) -> None:
    theirs = module()
    query, key, padding = inputs()
    query, key = query.requires_grad_(), key.requires_grad_()
    out, weights = theirs(query, key, key, padding)
    gradients = torch.autograd.grad(
        out.pow(3).sum() + weights.pow(2).sum(), [query, key, *theirs.parameters()]
    )
    results = pool.run(run, shape, seq_len, pieces, ranks=4)
    for found in results:
        torch.testing.assert_close(found[:2], [out.detach(), weights.detach()], **CLOSE)
    parts = zip(*(found[2:] for found in results), strict=True)
    for found, wanted in zip(parts, gradients, strict=True):
        torch.testing.assert_close(sum(found), wanted, **CLOSE)


@pytest.mark.parametrize("layout", [("zigzag",), ("zigzag", HELD, HELD), ("zigzag", "spiral")])
def test_no_pairs(layout: tuple) -> None:
    said = "spiral" if "spiral" in layout else "a pair"
    x = torch.zeros(1, 4, 1, 2)
    with pytest.raises(ValueError, match=said):
        usp.long_context_attention(x, x, x, layout=layout)
    with pytest.raises(ValueError, match=said):
        usp.MultiheadAttention(6, 3, layout=layout)
