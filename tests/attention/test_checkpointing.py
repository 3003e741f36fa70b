"""Activation checkpointing, whatever a policy saves: the same bits, and saved is not run again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pool as worker
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import usp
from usp.attention import block

# What is saved, by the name of the op; the rest is computed again.
POLICIES: dict[str, Callable[[str], bool]] = {
    "attention": lambda op: "attention" in op,
    "exchanges": lambda op: "all" in op and "to" in op,
    "sends": lambda op: "send" in op or "recv" in op,
    "collectives": lambda op: "c10d" in op,
    "products": lambda op: ".mm" in op or ".bmm" in op or ".addmm" in op,
    "everything": lambda op: True,
    "all but attention": lambda op: "attention" not in op,
    "nothing": lambda op: False,
}
WAYS = [*POLICIES, "not selective", "reentrant"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal, all extras": {
        "causal": True,
        "layout": "zigzag",
        "return_lse": True,
        "softcap": 4.0,
        "bias": (1, 4, True),
        "padding": True,
        "alibi_slopes": (0.5, 0.25, 0.125, 1.0),
    },
    "dropout, a bias for every query": {"dropout_p": 0.3, "bias": (2, 1, False), "fill": -1e9},
    "gathered": {
        "transport": "allgather",
        "causal": True,
        "layout": "striped",
        "bias": (1, 1, True),
        "fill": -1e9,
    },
}
LENGTH = 11


class Model(torch.nn.Module):
    """Attention twice, between products and dropout of features."""

    def __init__(self, mesh: usp.SequenceMesh | None, bias: Any = None, padding: bool = False, **o):
        super().__init__()
        torch.manual_seed(0)
        slopes, fill = o.pop("alibi_slopes", None), o.pop("fill", 0.0)
        slopes = None if slopes is None else torch.tensor(slopes, dtype=torch.float64)
        self.mesh, self.layout, self.padding = mesh, o.get("layout", "contiguous"), padding
        self.inner = torch.nn.Linear(12, 12, dtype=torch.float64)
        self.attention = usp.LongContextAttention(mesh, seq_len=LENGTH, alibi_slopes=slopes, **o)
        self.bias = None
        if bias is not None:
            batch, heads, rows = bias
            whole = torch.randn(batch, heads, LENGTH if rows else 1, LENGTH, dtype=torch.float64)
            # rows that share an offset, or with one row for all what the first ones see
            whole[:, :, ::3, : LENGTH if rows else 4] += fill
            own = usp.shard_sequence(whole, mesh, 2, self.layout) if rows else whole
            self.bias = torch.nn.Parameter(own)

    def attend(self, x: Tensor) -> Tensor:
        mask = None
        if self.padding:
            mask = torch.arange(LENGTH).remainder(5).eq(3).expand(2, -1)
            mask = usp.shard_sequence(mask, self.mesh, 1, self.layout)
        q = x.unflatten(-1, (4, 3))
        k = v = q[:, :, :2] + 1
        given = self.attention(q, k, v, attn_bias=self.bias, key_padding_mask=mask)
        if isinstance(given, tuple):
            return (given[0] * given[1].transpose(1, 2)[..., None].exp()).flatten(2)
        return given.flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(torch.tanh(self.inner(x)))
        return torch.tanh(self.attend(self.inner(x) + x))


def through(way: str | None, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, checkpointed in that way; None is without."""
    if way is None:
        return function(x)
    if way not in POLICIES:
        return checkpoint(function, x, use_reentrant=way == "reentrant")
    saves = POLICIES[way]

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = saves(str(op))
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, x, use_reentrant=False, context_fn=contexts)


def run(way: str | None, mesh: usp.SequenceMesh | None, options: dict[str, Any]) -> list[Tensor]:
    """Outputs and gradients of this rank."""
    model = Model(mesh, **options).train()
    whole = torch.randn(
        2, LENGTH, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    x = usp.shard_sequence(whole, mesh, 1, model.layout).requires_grad_()
    torch.manual_seed(5)
    out = through(way, model, x)
    # an odd cotangent, and another draw between the passes
    torch.rand(3)
    out.backward(torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out))
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]


def differing(meshes: tuple[int, int] | None, options: dict[str, Any]) -> list[str]:
    """The ways whose results are not, to the bit, those without checkpointing."""
    mesh = None if meshes is None else worker.mesh(*meshes)
    right = run(None, mesh, options)
    found = []
    for way in WAYS:
        got = run(way, mesh, options)
        if not all(torch.equal(a, b) for a, b in zip(got, right, strict=True)):
            found.append(way)
    return found


@pytest.mark.parametrize("meshes", [None, (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("options", OPTIONS)
def test_results_to_the_bit(pool, options: str, meshes: tuple[int, int] | None) -> None:
    # one device too goes to a worker, where fresh memory is poisoned
    ranks = meshes[0] * meshes[1] if meshes else 1
    assert pool.run(differing, meshes, OPTIONS[options], ranks=ranks) == [[]] * ranks


def forward_blocks(meshes: tuple[int, int] | None, way: str | None) -> int:
    """How many blocks of keys one forward and its backward let into the softmax."""
    mesh = None if meshes is None else worker.mesh(*meshes)
    counted = [
        mock.patch.object(block, name, mock.Mock(wraps=getattr(block, name)))
        for name in ("attention_forward", "attention_once")
    ]
    with counted[0] as several, counted[1] as alone:
        run(way, mesh, {})
    return several.call_count + alone.call_count


def blocks_by_way(meshes: tuple[int, int] | None) -> dict[str | None, int]:
    return {
        way: forward_blocks(meshes, way) for way in (None, "attention", "everything", "nothing")
    }


@pytest.mark.parametrize("meshes", [None, (2, 1), (1, 2)])
def test_a_saved_attention_is_not_run_again(pool, meshes: tuple[int, int] | None) -> None:
    once = 2 * (meshes[1] if meshes else 1)  # two layers, and as many blocks as the ring has
    expected = {None: once, "attention": once, "everything": once, "nothing": 2 * once}
    for counts in pool.run(blocks_by_way, meshes, ranks=2):
        assert counts == expected


def gathered(way: str | None, mesh: usp.SequenceMesh, length: int) -> list[Tensor]:
    """A block that joins its sequence, draws alike, and cuts it by a layout of its own."""
    layout = usp.DocumentZigzag((0, 4, length))
    random = torch.Generator().manual_seed(2)
    weight = torch.randn(12, 12, dtype=torch.float64, generator=random)
    whole = torch.randn(1, length, 12, dtype=torch.float64, generator=random)
    x = usp.shard_sequence(whole, mesh, 1, "striped").requires_grad_()

    def block(x: Tensor) -> Tensor:
        x = usp.unshard_sequence(torch.sin(x @ weight), mesh, 1, "striped", length)
        with usp.rng.replicated(mesh):
            x = x * torch.rand(12)
        x = usp.shard_sequence(x + torch.arange(length)[:, None], mesh, 1, layout)
        return torch.sin(usp.unshard_sequence(x, mesh, 1, layout) @ weight)

    torch.manual_seed(6)
    out = through(way, block, x)
    out.square().sum().backward()
    return [out.detach(), x.grad]


def differing_gathered() -> list[str]:
    mesh, found = worker.mesh(2, 1), []
    for number, way in enumerate(WAYS):
        length = 17 + number  # tables are made at the first call with a length
        got = gathered(way, mesh, length)
        right = gathered(None, mesh, length)
        if not all(torch.equal(a, b) for a, b in zip(got, right, strict=True)):
            found.append(way)
    return found


def test_what_else_communicates(pool) -> None:
    assert pool.run(differing_gathered, ranks=2) == [[]] * 2
