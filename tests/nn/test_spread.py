"""A region of a model with one Spread in it is the model on one device, and asks at most once."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import compiling
import pool as worker
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_cases import documents, held
from pool import RemoteError
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import usp
from usp import masks
from usp.testing import WireBytes, dense_attention

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)]
CHANNELS, HEADS = 6, 3
EIGHT = {"rtol": 1e-8, "atol": 1e-8}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    ulysses, ring = draw(st.sampled_from(MESHES))
    length = draw(st.sampled_from([1, 2, 5, 13, 17]))
    cu_seqlens = draw(st.one_of(st.none(), documents(length)))
    layouts: list[Any] = ["contiguous", "zigzag", "striped"]
    layouts.append(usp.Held(draw(held(length, ulysses * ring))))
    if cu_seqlens is not None:
        layouts.append(usp.DocumentZigzag(cu_seqlens))
    return {
        "mesh": (ulysses, ring),
        "layout": draw(st.sampled_from(layouts)),
        "length": length,
        "cu_seqlens": cu_seqlens,
        "infer": draw(st.booleans()),
    }


def parameters(seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = (3 * CHANNELS, CHANNELS), (32, CHANNELS), (CHANNELS, CHANNELS)
    made = [torch.randn(shape, generator=random, dtype=torch.float64) / 3 for shape in shapes]
    return [p.requires_grad_() for p in made]


def tokens(length: int) -> Tensor:
    random = torch.Generator().manual_seed(length)
    return torch.randn(2, length, CHANNELS, generator=random, dtype=torch.float64)


def qkv(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.unflatten(2, (HEADS, -1)) for t in (x @ weight.mT).chunk(3, 2))


def block(x: Tensor, weights: list[Tensor], spread: usp.Spread) -> Tensor:
    """Positions, attention, a norm across tokens, and a look at the token before."""
    projection, table, mix = weights
    x = x + table[spread.positions()]
    x = x + spread.attention(*qkv(x, projection), causal=True).flatten(2)
    variance, mean = spread.var_mean(x, correction=0, keepdim=True)
    x = (x - mean) / (variance + 0.1).sqrt()
    return x + spread.roll(x, 1) @ mix


def plain_block(x: Tensor, weights: list[Tensor], cu_seqlens: Any) -> Tensor:
    projection, table, mix = weights
    x = x + table[: x.shape[1]]
    out, _ = dense_attention(*qkv(x, projection), causal=True, cu_seqlens=cu_seqlens)
    x = x + out.flatten(2)
    variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
    x = (x - mean) / (variance + 0.1).sqrt()
    return x + x.roll(1, 1) @ mix


def loss_of(x: Tensor) -> Tensor:
    """Of each token its own: a part of the tokens has a part of the loss."""
    return (x.pow(3) + x.sin()).sum()


def made(case: dict[str, Any], mesh: usp.SequenceMesh) -> usp.Spread:
    if not case["infer"]:
        return usp.Spread(mesh, case["layout"], case["length"], case["cu_seqlens"])
    mine = usp.shard_sequence(tokens(case["length"]), mesh, 1, case["layout"]).shape[1]
    return usp.Spread.infer(mine, mesh, case["layout"], case["cu_seqlens"])


def run(case: dict[str, Any], repeat: bool = False) -> list[Tensor]:
    """Two blocks: the whole result, the first token, the gradients of this rank's loss."""
    mesh = worker.mesh(*case["mesh"])
    spread, weights = made(case, mesh), parameters()
    x = tokens(case["length"]).requires_grad_()
    y = spread.shard(x)
    assert y.shape[1] == spread.local_seq_len
    for _ in range(2):
        y = (
            checkpoint(block, y, weights, spread, use_reentrant=False)
            if repeat
            else block(y, weights, spread)
        )
    first = spread.take(y, [0])
    loss = loss_of(y) + first.square().sum() / mesh.size
    gradients = torch.autograd.grad(loss, [x, *weights], retain_graph=True)
    return [spread.unshard(y).detach(), first.detach(), *gradients]


def expected(case: dict[str, Any]) -> list[Tensor]:
    weights, x = parameters(), tokens(case["length"]).requires_grad_()
    y = x
    for _ in range(2):
        y = plain_block(y, weights, case["cu_seqlens"])
    loss = loss_of(y) + y[:, :1].square().sum()
    return [y.detach(), y[:, :1].detach(), *torch.autograd.grad(loss, [x, *weights])]


@settings(max_examples=settings.default.max_examples // 3)
@given(cases(), st.booleans())
def test_a_region_equals_one_device(pool, case: dict[str, Any], repeat: bool) -> None:
    ulysses, ring = case["mesh"]
    results = pool.run(run, case, repeat, ranks=ulysses * ring)
    y, first, *gradients = expected(case)
    for whole, token, *_ in results:
        torch.testing.assert_close(whole, y, **EIGHT)
        torch.testing.assert_close(token, first, **EIGHT)
    for found, wanted in zip(zip(*(r[2:] for r in results), strict=True), gradients, strict=True):
        torch.testing.assert_close(sum(found), wanted, **EIGHT)  # sequence ranks add


def batches(lengths: list[int], validate: bool | None) -> float:
    """One module, batches of any length, of which each rank sees its own tokens alone."""
    mesh, worst = worker.mesh(1, 2), 0.0
    attention = usp.LongContextAttention(mesh, causal=True, validate="never")
    for length in lengths:
        x = tokens(length).unflatten(2, (HEADS, -1))
        mine = usp.shard_sequence(x, mesh, 1, "zigzag")
        spread = usp.Spread.infer(mine.shape[1], mesh, "zigzag", validate=validate)
        assert spread.seq_len == length
        out = attention(mine, mine, mine, spread=spread)
        wanted = dense_attention(x, x, x, causal=True)[0]
        worst = max(worst, (spread.unshard(out) - wanted).abs().max().item())
    return worst


@pytest.mark.parametrize("validate", [None, True, False])
def test_batches_of_any_length(pool, validate: bool | None) -> None:
    assert max(pool.run(batches, [8, 5, 7, 1], validate, ranks=2)) < 1e-9


def collectives(calls: int) -> tuple[int, int, int]:
    """Of asking, and of as many calls with the answer and with the length by hand."""
    mesh = worker.mesh(2, 2)
    x = tokens(13).unflatten(2, (HEADS, -1))
    mine = usp.shard_sequence(x, mesh, 1)
    with WireBytes() as asking, torch.no_grad():
        spread = usp.Spread.infer(mine.shape[1], mesh, validate=False)
    with WireBytes() as answered, torch.no_grad():
        for _ in range(calls):
            spread.attention(mine, mine, mine)
    with WireBytes() as named, torch.no_grad():
        for _ in range(calls):
            usp.long_context_attention(mine, mine, mine, mesh, seq_len=13, validate=False)
    return tuple(sum(wire.calls.values()) for wire in (asking, answered, named))


def test_a_length_is_asked_for_once_a_region(pool) -> None:
    for asking, answered, named in pool.run(collectives, 5, ranks=4):
        assert asking == 2  # one along each axis
        assert answered == named


def two_batches() -> list[float]:
    """Both forwards before the first backward, whose checkpoints compute again."""
    mesh, errors, losses = worker.mesh(1, 2), [], []
    for length, cuts in ((7, (0, 3, 7)), (11, (0, 6, 11))):
        layout = usp.DocumentZigzag(cuts)
        spread = usp.Spread(mesh, layout, cu_seqlens=cuts)
        weights, x = parameters(), tokens(length).requires_grad_()
        y = checkpoint(block, spread.shard(x), weights, spread, use_reentrant=False)
        losses.append((loss_of(y), x, cuts))
    for loss, x, cuts in losses:
        (found,) = torch.autograd.grad(loss, x)
        other = x.detach().clone().requires_grad_()
        wanted = torch.autograd.grad(loss_of(plain_block(other, parameters(), cuts)), other)[0]
        mine = usp.positions(x.shape[1], mesh, usp.DocumentZigzag(cuts))
        errors.append((found - wanted)[:, mine].abs().max().item())
    return errors


def test_what_is_computed_again_keeps_its_own_spread(pool) -> None:
    assert max(max(errors) for errors in pool.run(two_batches, ranks=2)) < 1e-9


def fixed() -> list[Tensor]:
    mesh = worker.mesh(1, 2)
    spread = usp.Spread(mesh, "striped", 13)
    twins = [spread, copy.deepcopy(spread), pickle.loads(pickle.dumps(spread))]
    x = tokens(13).unflatten(2, (HEADS, -1))
    mine = spread.shard(x)
    outs = [usp.LongContextAttention(**twin.options)(mine, mine, mine) for twin in twins]
    torch.manual_seed(0)
    module = usp.MultiheadAttention(CHANNELS, HEADS, batch_first=True, **spread.options).double()
    outs.append(module(mine.flatten(2), mine.flatten(2), mine.flatten(2))[0])
    with spread.replicated():
        outs.append(torch.rand(3))
    with spread.sharded():
        outs.append(torch.rand(3))
    return outs


def test_options_of_modules_and_random_streams(pool) -> None:
    (a, b, c, _, alike, mine), (*_, alike_too, other) = pool.run(fixed, ranks=2)
    assert torch.equal(a, b) and torch.equal(a, c)
    assert torch.equal(alike, alike_too) and not torch.equal(mine, other)


REFUSED = {
    "no length": ({}, r"the one length.*got none"),
    "two lengths": ({"seq_len": 5, "cu_seqlens": (0, 6)}, r"'cu_seqlens\[-1\]': 6, 'seq_len': 5"),
    "a layout for another": ({"layout": usp.Held((4,)), "seq_len": 5}, "'the layout': 4"),
    "a layout for more ranks": ({"layout": usp.Held((4, 1))}, "2 ranks, but the mesh has 1"),
    "an unknown layout": ({"layout": "diagonal", "seq_len": 5}, "diagonal"),
    "no documents": ({"cu_seqlens": (0, 3, 2)}, "must not decrease"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusals(case: tuple) -> None:
    options, said = case
    with pytest.raises(ValueError, match=said):
        usp.Spread(None, **options)


def test_what_does_not_fit_a_spread() -> None:
    spread = usp.Spread(None, seq_len=5)
    with pytest.raises(ValueError, match=r"x has 4 tokens along dim 1.*5"):
        spread.shard(torch.zeros(1, 4))
    x = torch.zeros(1, 5, 2, 2)
    with pytest.raises(ValueError, match="leave out the others"):
        usp.LongContextAttention()(x, x, x, spread=spread, seq_len=5)


def uncut() -> None:
    mesh = worker.mesh(1, 2)
    usp.Spread.infer(4 + 2 * mesh.rank, mesh)


def test_shares_that_nobody_cut_are_refused_on_every_rank(pool) -> None:
    for outcome in pool.outcomes(uncut, ranks=2):
        assert isinstance(outcome, RemoteError) and "(4, 6) tokens" in outcome.message


def wrong_on_one_rank(kind: str, linear: bool) -> None:
    mesh = worker.mesh(1, 2)
    spread, more, right = usp.Spread(mesh, seq_len=4), {}, mesh.rank == 0
    wrong: dict[str, Any] = {
        "no Spread": mesh,
        "mesh": usp.Spread(worker.mesh(2, 1), seq_len=4),
        "length": usp.Spread(mesh, seq_len=3),
        "layout": usp.Spread(mesh, usp.Held((1, 3))),
        "documents": usp.Spread(mesh, seq_len=4, cu_seqlens=(0, 3, 4)),
        "both": spread,
    }
    if not right and kind == "both":
        more = {"seq_len": 4}
    x = torch.zeros(1, 2, 2, 2)
    module = usp.LinearAttention(mesh) if linear else usp.LongContextAttention(mesh)
    module(x, x, x, spread=spread if right else wrong[kind], **more)


WRONG = {
    "no Spread": "must be a usp.Spread, got SequenceMesh",
    "mesh": r"on mesh: rank 0 has .*ring_degree=2\), rank 1 has .*ring_degree=1\)",
    "length": "[Rr]ank 1.* of 3|disagree on seq_len",
    "layout": "[Rr]ank 1|disagree on layout",
    "documents": "disagree on .*cu_seqlens",
    "both": "leave out the others",
}


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("kind", WRONG)
def test_a_spread_that_is_wrong_on_one_rank(pool, kind: str, linear: bool) -> None:
    for outcome in pool.outcomes(wrong_on_one_rank, kind, linear, ranks=2):
        assert isinstance(outcome, RemoteError) and re.search(WRONG[kind], outcome.message), outcome


def elsewhere() -> list[float]:
    """On all ranks in place of the module's: a mesh of other degrees, and one device."""
    mesh, other = worker.mesh(1, 2), worker.mesh(2, 1)
    x = tokens(8).unflatten(2, (HEADS, -1))
    wanted = dense_attention(x, x, x)[0]
    module, errors = usp.LongContextAttention(mesh), []
    for spread in (usp.Spread(other, seq_len=8), usp.Spread(None, seq_len=8)):
        mine = spread.shard(x)
        errors.append((module(mine, mine, mine, spread=spread) - spread.shard(wanted)).abs().max())
    return [error.item() for error in errors]


def test_a_mesh_in_place_of_that_of_the_module(pool) -> None:
    assert max(map(max, pool.run(elsewhere, ranks=2))) < 1e-9


def streams() -> list[Tensor]:
    return [torch.randn(2, n, 3, 2, dtype=torch.float64) for n in (7, 25, 7, 25, 7, 25)]


def joint(shape: tuple[int, int]) -> list[Tensor]:
    """On a worker: q, k, v of text and image, each stream cut for itself and joined here."""
    mesh, wholes = worker.mesh(*shape), [x.requires_grad_() for x in streams()]
    mine = [usp.shard_sequence(x, mesh, 1) for x in wholes]
    q, k, v = (torch.cat(mine[i : i + 2], 1) for i in (0, 2, 4))
    layout = usp.held(q.shape[1], mesh)
    out = usp.long_context_attention(q, k, v, mesh, layout=layout)
    text, image = out.split([x.shape[1] for x in mine[:2]], 1)
    text, image = usp.unshard_sequence(text, mesh, 1), usp.unshard_sequence(image, mesh, 1)
    return [text, image, *torch.autograd.grad(loss_of(text) + loss_of(image), wholes)]


@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (3, 1)], ids=str)
def test_text_and_image_cut_each_for_itself(pool, shape: tuple[int, int]) -> None:
    ranks = shape[0] * shape[1]
    results = pool.run(joint, shape, ranks=ranks)
    torch.manual_seed(0)
    wholes = [x.requires_grad_() for x in streams()]
    q, k, v = (torch.cat(wholes[i : i + 2], 1) for i in (0, 2, 4))
    text, image = dense_attention(q, k, v)[0].split((7, 25), 1)
    wanted = [text, image, *torch.autograd.grad(loss_of(text) + loss_of(image), wholes)]
    for found in results:
        torch.testing.assert_close(found[:2], wanted[:2], **EIGHT)
    for found, gradient in zip(
        zip(*(r[2:] for r in results), strict=True), wanted[2:], strict=True
    ):
        torch.testing.assert_close(sum(found), ranks * gradient, **EIGHT)  # all have the loss


def in_graph(x: Tensor, table: Tensor, mesh: usp.SequenceMesh) -> Tensor:
    spread = usp.Spread(mesh, "zigzag", x.shape[1], validate=False)
    x = spread.shard(x) + table[spread.positions()]
    x = spread.roll(x, 1) + spread.take(x, [0, -1]).sum(1, keepdim=True)
    variance, mean = spread.var_mean(x, keepdim=True)
    x = (x - mean) * variance
    return spread.unshard(spread.attention(x, x, x, mask=masks.causal() & masks.window(5, 0)))


def compiled() -> tuple[int, float]:
    torch.manual_seed(0)
    given = torch.randn(1, 13, 3, 4), torch.randn(13, 3, 4), worker.mesh(2, 2)
    compiler = compiling.Counting()
    with compiling.afresh():
        found = torch.compile(in_graph, fullgraph=True, backend=compiler)(*given)
    return compiler.graphs, (found - in_graph(*given)).abs().max().item()


def test_a_region_is_one_graph(pool) -> None:
    assert pool.run(compiled, ranks=4) == [(1, pytest.approx(0.0, abs=1e-6))] * 4
