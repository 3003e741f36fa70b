"""usp.MultiheadAttention on a mesh is torch.nn.MultiheadAttention on one device, in fp64."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pool as workers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mesh_cases import held
from multihead_cases import (
    Case,
    Place,
    assert_same,
    by_torch,
    by_us,
    cases,
    join,
    make_ours,
    make_tensors,
    on_worker,
)
from torch import nn

import usp

MESHES = [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (3, 2), (1, 5), (6, 1)]


@st.composite
def places(draw: st.DrawFn, case: Case) -> Place:
    layout = draw(st.sampled_from(["contiguous", "zigzag", "striped", "documents", "held"]))
    if layout == "documents":
        cut = draw(st.integers(0, case.query_len))
        layout = usp.DocumentZigzag((0, cut, case.query_len))
        if case.query_len != case.key_len:
            layout = "zigzag"
    ulysses, ring = draw(st.sampled_from(MESHES))
    if layout == "held":
        layout = usp.Held(draw(held(case.query_len, ulysses * ring)))
        if case.query_len != case.key_len:
            layout = "contiguous"
    transport = draw(st.sampled_from(["ring", "allgather"]))
    return Place(ulysses, ring, layout, transport, draw(st.booleans()))


def run(pool, case: Case, place: Place):
    return join(case, place, pool.run(on_worker, case, place, ranks=place.ranks))


@given(data=st.data())
def test_equals_torch_on_one_device(pool, data) -> None:
    case = data.draw(cases())
    place = data.draw(places(case))
    assert_same(run(pool, case, place), by_torch(case))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_longer_sequences(pool, mesh) -> None:
    case = Case(
        query_len=61,
        key_len=47,
        num_heads=4,
        inputs="cross",
        kdim=5,
        padding="float",
        mask="float",
        mask_dims=3,
        add_bias_kv=True,
        average=False,
    )
    assert_same(run(pool, case, Place(*mesh, "zigzag")), by_torch(case))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("extra", [False, True])
def test_dropout_is_the_same_on_every_mesh(pool, mesh, extra) -> None:
    case = Case(
        query_len=17,
        key_len=17,
        dropout=0.4,
        add_bias_kv=extra,
        add_zero_attn=extra,
        padding="bool",
    )
    for need_weights in (True, False):
        case = replace(case, need_weights=need_weights)
        assert_same(run(pool, case, Place(*mesh, "striped")), by_us(case))


def test_dropout_differs_from_none(pool) -> None:
    case, place = Case(query_len=17, key_len=17, dropout=0.4), Place(2, 1)
    dropped = run(pool, case, place)["output"]
    assert not torch.allclose(dropped, run(pool, replace(case, dropout=0.0), place)["output"])


def _copies(case: Case) -> list[torch.Tensor]:
    mesh = workers.mesh(2, 2)
    module = make_ours(case, mesh=mesh, layout="zigzag", seq_len=case.query_len)
    whole = make_tensors(case)["query"]
    x = usp.shard_sequence(whole, mesh, 0, "zigzag")
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    assert list(module.state_dict()) == list(nn.MultiheadAttention(12, 3).state_dict())
    return [m(x, x, x)[0].detach() for m in (module, *others)]


def test_copies_and_pickles_with_a_mesh(pool) -> None:
    for out, *others in pool.run(_copies, Case(query_len=13), ranks=4):
        assert all(torch.equal(out, other) for other in others)


def _disagreement(kind: str) -> None:
    mesh = workers.mesh(2, 1)
    module = usp.MultiheadAttention(8, 2, mesh=mesh)
    odd = mesh.rank == 1
    x = torch.randn(3, 2, 8)
    options = {}
    if kind == "features":
        x = x[..., :7] if odd else x
    elif kind == "dtype":
        x = x.double() if odd else x
    elif kind == "need_weights":
        options["need_weights"] = odd
    elif kind == "padding":
        options["key_padding_mask"] = torch.zeros(2, 3, dtype=torch.bool if odd else torch.float32)
    elif kind == "length of padding":
        x = x[:2] if odd else x
        module.placement = replace(module.placement, seq_len=6)
        options["key_padding_mask"] = torch.zeros(2, len(x))
    elif kind.startswith("mask"):
        named = 6 if "named" in kind else None
        module.placement = replace(module.placement, seq_len=named)
        options["attn_mask"] = torch.zeros(3, 5 if odd else 6)
    elif kind == "hint":
        options["is_causal"] = odd
    elif kind == "length":
        x = x[:1] if odd else x
    module(x, x, x, **options)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("features", "query must have 8 features, got 7"),
        ("dtype", "dtype"),
        ("need_weights", "disagree on need_weights"),
        ("padding", "disagree on key_padding_mask"),
        ("length of padding", "holds 2 tokens.* 3 of 6"),
        ("mask", "disagree on keys of attn_mask: rank 0 has 6, rank 1 has 5"),
        ("mask of a named length", r"\(3, 6\) or \(4, 3, 6\), got \(3, 5\)"),
        ("hint", "is_causal is a hint"),
        ("length", "4 in all"),
    ],
)
def test_what_one_rank_cannot_take_all_refuse(pool, kind, message) -> None:
    outcomes = pool.outcomes(_disagreement, kind, ranks=2)
    for outcome in outcomes:
        assert isinstance(outcome, workers.RemoteError) and outcome.kind != "Hang", outcome
        with pytest.raises(workers.RemoteError, match=message):
            raise outcome


def _single_token(layout: str) -> list[torch.Tensor]:
    mesh = workers.mesh(2, 1)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    usp.replace_attention(encoder, mesh, layout=layout, seq_len=1)
    x = usp.shard_sequence(torch.ones(1, 1, 8), mesh, 1, layout)
    mask = torch.zeros(x.shape[1], 1)
    return encoder(x, mask=mask)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_a_causal_mask_seen_on_one_rank_alone(pool, layout) -> None:
    # the encoder tells that rank is_causal=True and the other False
    shapes = [tuple(out.shape) for out in pool.run(_single_token, layout, ranks=2)]
    assert shapes == [(1, 1, 8), (1, 0, 8)]


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("extra", [False, True])
def test_weights_of_rows_that_a_finite_mask_fills_are_those_of_the_output(extra, fill) -> None:
    """As if the fill were -inf, or the offset of the row were not there."""
    torch.manual_seed(1)
    module = usp.MultiheadAttention(8, 2, batch_first=True, add_zero_attn=extra, causal=True)
    x, scores = torch.randn(2, 7, 8), torch.randn(7, 7)
    filled = torch.zeros(7, 7, dtype=torch.bool)
    filled[4], filled[:, :2] = True, True  # a row, and the first rows by all that they see
    results, masks = [], (scores.masked_fill(filled, fill), scores.masked_fill(filled, -torch.inf))
    if fill == -1e9 and not extra:
        seen_alone = filled | torch.ones(7, 7, dtype=torch.bool).triu(1)
        rows = seen_alone.all(1, keepdim=True)
        masks = masks[0], torch.where(rows, scores.masked_fill(filled, 0.0), masks[1])
    for mask in masks:
        mask.requires_grad_()
        out, weights = module(x, x, x, attn_mask=mask)
        results.append((out, weights, *torch.autograd.grad((out, weights), mask, (out, weights))))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
