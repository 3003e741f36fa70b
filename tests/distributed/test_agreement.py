"""Ranks that were told different things, or are at different places, and how they find out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import pool as worker
import pytest
import torch
from pool import RemoteError
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import usp
from usp.distributed.agreement import meets
from usp.testing import dense_attention, dropout_multiplier

Attention = Callable[..., Tensor]


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randn(
        1, length, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def function(mesh: usp.SequenceMesh, **options: Any) -> Attention:
    return lambda *qkv, **at_call: usp.long_context_attention(*qkv, mesh, **options, **at_call)


def errors(attention: Attention, mesh: usp.SequenceMesh, length: int, **options: Any) -> list:
    """Of the result and of the gradients, against dense attention in one process."""
    layout, mask = options.pop("layout", "contiguous"), dict(options)
    q, k, v = (tokens(length, seed) for seed in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mine = [usp.shard_sequence(x, mesh, 1, layout) for x in leaves]
    out = attention(*mine)
    wanted = dense_attention(q, k, v, **mask)[0]
    dout = tokens(length, 9)
    found = torch.autograd.grad(out, leaves, usp.shard_sequence(dout, mesh, 1, layout))
    expected = torch.autograd.grad(wanted, leaves, dout)
    differences = [out - usp.shard_sequence(wanted, mesh, 1, layout)]
    for a, b in zip(found, expected, strict=True):
        differences.append(
            usp.shard_sequence(a, mesh, 1, layout) - usp.shard_sequence(b, mesh, 1, layout)
        )
    return [x.abs().max().item() if x.numel() else 0.0 for x in differences]


# lengths of the batches of one module, which has seen no seq_len; ulysses, ring
BATCHES = [([8, 5, 7], (1, 2)), ([13, 1, 2, 12], (2, 2)), ([7, 9], (3, 1))]


def batches(lengths: list[int], shape: tuple[int, int], layout: str, kind: str) -> float:
    mesh = worker.mesh(*shape)
    options = {"causal": True, "layout": layout}
    attention = function(mesh, **options)
    if kind == "infer":
        attention = function(mesh, seq_len="infer", validate=False, **options)
    elif kind != "function":
        attention = usp.LongContextAttention(mesh, validate=kind, **options)
    return max(max(errors(attention, mesh, n, **options)) for n in lengths)


@pytest.mark.parametrize("kind", ["function", "infer", "first", "always", "never"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("lengths", "shape"), BATCHES, ids=str)
def test_batches_of_any_length(pool, lengths: list, shape: tuple, layout: str, kind: str) -> None:
    """Whole lengths are what the ranks hold together, at each call."""
    assert max(pool.run(batches, lengths, shape, layout, kind, ranks=shape[0] * shape[1])) < 1e-9


def multihead_batches(lengths: list[int], layout: str, validate: str) -> float:
    mesh = worker.mesh(2, 1)
    torch.manual_seed(4)
    ours = usp.MultiheadAttention(
        6, 2, mesh=mesh, batch_first=True, layout=layout, validate=validate
    ).double()
    theirs = nn.MultiheadAttention(6, 2, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    worst = 0.0
    for length in lengths:
        x = tokens(length).flatten(2)
        mine = usp.shard_sequence(x, mesh, 1, layout)
        wanted = usp.shard_sequence(theirs(x, x, x)[0], mesh, 1, layout)
        worst = max(worst, (ours(mine, mine, mine)[0] - wanted).abs().max().item())
    return worst


@pytest.mark.parametrize("validate", ["first", "never"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_batches_of_any_length_for_multihead_attention(pool, layout: str, validate: str) -> None:
    assert max(pool.run(multihead_batches, [8, 5, 7, 2], layout, validate, ranks=2)) < 1e-9


def cut_as(held: list[int], kind: str) -> Any:
    mesh = worker.mesh(1, len(held))
    x = torch.randn(2, held[mesh.rank], 6, requires_grad=True)
    if kind == "unshard":
        return usp.unshard_sequence(x, mesh, 1)
    if kind == "multihead":
        return usp.MultiheadAttention(6, 2, mesh=mesh, batch_first=True)(x, x, x)
    q = x.unflatten(2, (2, 3))
    if kind == "function":
        return usp.long_context_attention(q, q, q, mesh)
    attention = usp.LongContextAttention(mesh)
    fine = torch.zeros(2, 3, 2, 3, requires_grad=True)
    attention(fine, fine, fine)
    return attention(q, q, q)


@pytest.mark.parametrize("kind", ["function", "module", "multihead", "unshard"])
@pytest.mark.parametrize("held", [[3, 3, 3, 0], [2, 2, 1, 0], [1, 2, 2, 2], [4, 2, 2, 2]], ids=str)
def test_shares_that_shard_sequence_would_not_cut(pool, held: list[int], kind: str) -> None:
    """The first two are what torch.chunk makes of 9 and 5 tokens."""
    for outcome in pool.outcomes(cut_as, held, kind, ranks=4):
        assert isinstance(outcome, RemoteError) and outcome.kind == "ValueError", outcome
        assert str(tuple(held)) in outcome.message and f"{sum(held)} in all" in outcome.message


def one_rank_uses_a_copy(lengths: list[int]) -> float:
    """It copied the module before the first call, so only that rank's would compare."""
    mesh = worker.mesh(1, 2)
    attention = usp.LongContextAttention(mesh, causal=True)
    twin = copy.deepcopy(attention)
    worst = max(errors(attention, mesh, 8, causal=True))
    used = twin if mesh.rank else attention
    return max([worst, *(max(errors(used, mesh, n, causal=True)) for n in lengths)])


def test_a_copy_that_one_rank_alone_uses(pool) -> None:
    assert max(pool.run(one_rank_uses_a_copy, [8, 5, 8], ranks=2)) < 1e-9


def gradients_at_the_second_call(deviant: int, first: str) -> Any:
    mesh = worker.mesh(2, 1)
    attention = usp.LongContextAttention(mesh, dropout_p=0.5)
    q = torch.randn(1, 3, 2, 3, requires_grad=first == "train")
    attention.train(first == "train")(q, q, q)
    q = torch.randn(1, 3, 2, 3, requires_grad=mesh.rank != deviant)
    return attention.train()(q, q, q).sum().backward()


@pytest.mark.parametrize("first", ["train", "eval"])
@pytest.mark.parametrize("deviant", [0, 1])
def test_gradients_that_one_rank_does_not_need(pool, deviant: int, first: str) -> None:
    for outcome in pool.outcomes(gradients_at_the_second_call, deviant, first, ranks=2):
        assert isinstance(outcome, RemoteError) and "gradients needed" in outcome.message


def two_outputs(mine: str, kind: str, then: str) -> Any:
    """Two calls; this rank's loss depends on the outputs named in ``mine``, its own first."""
    mesh = worker.mesh(1, 2)
    a, b = (torch.randn(1, 3, 2, 3, requires_grad=True) for _ in range(2))
    if kind == "unshard":
        outs = [usp.unshard_sequence(x, mesh, 1) for x in (a, b)]
    elif kind == "multihead":
        layer = usp.MultiheadAttention(6, 2, mesh=mesh, batch_first=True)
        outs = [layer(*[x.flatten(2)] * 3, need_weights=False)[0] for x in (a, b)]
    else:
        attention = function(mesh) if kind == "function" else usp.LongContextAttention(mesh)
        outs = [attention(x, x, x) for x in (a, b)]
    used = dict(zip("ab", outs, strict=True))
    sum(used[name].square().sum() for name in mine.split()[mesh.rank]).backward()
    if then == "gradients":
        usp.all_reduce_gradients([nn.Parameter(torch.ones(2))], mesh)
    elif then == "call":
        function(mesh)(a, a, a)
    elif then == "replicated":
        with usp.rng.replicated(mesh):
            pass
    return "done"


@pytest.mark.parametrize("kind", ["function", "module", "multihead", "unshard"])
def test_losses_on_different_outputs(pool, kind: str) -> None:
    assert pool.run(two_outputs, "ab ab", kind, "gradients", ranks=2) == ["done"] * 2
    for outcome in pool.outcomes(two_outputs, "a b", kind, "", ranks=2):
        assert isinstance(outcome, RemoteError) and outcome.kind == "ValueError", outcome
        assert "whose backward" in outcome.message and "same outputs" in outcome.message


@pytest.mark.parametrize("then", ["gradients", "call", "replicated"])
def test_a_backward_that_one_rank_alone_runs(pool, then: str) -> None:
    """The other goes on to whatever comes next, and both hear of it there."""
    for outcome in pool.outcomes(two_outputs, "ab b", "module", then, ranks=2):
        assert isinstance(outcome, RemoteError) and outcome.kind == "ValueError", outcome
        assert "the backward of" in outcome.message and "different places" in outcome.message


def computed_again_by_one(kind: str) -> None:
    """Rank 1 has a checkpoint, or keeps its graph for a second backward."""
    mesh, repeats = worker.mesh(1, 2), partial(checkpoint, use_reentrant=False)
    q, k, v = (torch.randn(1, 3, 2, 3, requires_grad=True) for _ in range(3))
    attend = function(mesh, chunks=2 if kind == "chunks" else 1)
    if kind == "latent":
        q, k, v = torch.randn(1, 3, 2, 3, requires_grad=True), *torch.randn(2, 1, 3, 1)
        ups = torch.randn(2, 2, 1), torch.randn(2, 2, 1)
        attend = lambda *latents: usp.latent_attention(*latents, *ups, mesh)  # noqa: E731
    if mesh.rank and kind == "selective":
        saved = partial(create_selective_checkpoint_contexts, [torch.ops.usp.attention.default])
        out = repeats(attend, q, k, v, context_fn=saved)
    else:
        again = kind == "selective" or (mesh.rank and kind != "twice")
        out = repeats(attend, q, k, v) if again else attend(q, k, v)
    out.sum().backward(retain_graph=bool(mesh.rank))
    if kind == "twice":
        with suppress(RuntimeError):  # of the rank whose graph is gone
            out.sum().backward()
        function(mesh)(q, k, v)


@pytest.mark.parametrize("kind", ["attention", "chunks", "latent", "selective", "twice"])
def test_a_rank_that_alone_computes_again(pool, kind: str) -> None:
    for outcome in pool.outcomes(computed_again_by_one, kind, ranks=2):
        assert isinstance(outcome, RemoteError) and "different places" in outcome.message, outcome


def test_ranks_that_are_but_names() -> None:
    """Torch's backend for what never runs: shapes of a mesh of any size, in one process."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=3, world_size=64)
    try:
        mesh = usp.init_mesh(4, 16, device_type="cpu")
        q = torch.empty(1, 5, 8, 2, device="meta", requires_grad=True)
        assert usp.long_context_attention(q, q, q, mesh, seq_len=320).shape == q.shape
        assert usp.unshard_sequence(q, mesh, 1, seq_len=320).shape == (1, 320, 8, 2)
    finally:
        torch.distributed.destroy_process_group()


def other_parameters(sizes: list[int]) -> None:
    mesh = worker.mesh(1, 2)
    usp.all_reduce_gradients([nn.Parameter(torch.ones(sizes[mesh.rank]))], mesh)


def test_parameters_that_differ(pool) -> None:
    for outcome in pool.outcomes(other_parameters, [3, 4], ranks=2):
        assert isinstance(outcome, RemoteError) and outcome.kind == "ValueError"
        assert "rank 0 has 3, rank 1 has 4" in outcome.message


def next_seed(mesh: usp.SequenceMesh) -> int:
    """What the first rank will draw."""
    random = torch.Generator()
    random.set_state(torch.get_rng_state())
    return mesh.gather_numbers(int(torch.randint(2**62, (), generator=random)))[0][0]


def uneven_dropout(kind: str) -> tuple[list[float], set[int]]:
    """Three steps, and beside them dropout that draws a number for each element of a rank."""
    mesh, length = worker.mesh(1, 2), 13
    torch.manual_seed(5)
    layer = usp.LongContextAttention(mesh, dropout_p=0.4)
    if kind == "function":
        layer = function(mesh, dropout_p=0.4)
    differences, seeds = [], set()
    for _ in range(3):
        q, k, v = (tokens(length, seed) for seed in range(3))
        seed = next_seed(mesh)
        out = layer(*(usp.shard_sequence(x, mesh, 1) for x in (q, k, v)))
        keep = dropout_multiplier(0.4, seed, 1, 2, length, length)
        wanted = dense_attention(q, k, v, dropout_keep=keep)[0]
        differences.append((out - usp.shard_sequence(wanted, mesh, 1)).abs().max().item())
        seeds.add(seed)
        torch.nn.functional.dropout(out, 0.1)  # 7 tokens on one rank, 6 on the other
    return differences, seeds


@pytest.mark.parametrize("kind", ["function", "module"])
def test_attention_dropout_beside_other_dropout_and_uneven_shards(pool, kind: str) -> None:
    """The seed that the first rank draws is that of all."""
    for differences, seeds in pool.run(uneven_dropout, kind, ranks=2):
        assert max(differences) < 1e-9 and len(seeds) == 3


@pytest.mark.parametrize(
    ("device_type", "validate", "asks", "expected"),
    [
        ("cpu", None, False, True),
        ("cuda", None, False, False),
        ("cuda", None, True, True),
        ("cuda", True, False, True),
        ("cpu", False, True, False),
    ],
)
def test_when_ranks_meet(
    device_type: str, validate: bool | None, asks: bool, expected: bool
) -> None:
    mesh: Any = SimpleNamespace(size=2, device_type=device_type)
    assert meets(mesh, validate, asks) is expected
    assert not meets(None, validate, asks)
    assert not meets(SimpleNamespace(size=1, device_type=device_type), validate, asks)
