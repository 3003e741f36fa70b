"""Documents on submeshes of their own: attention, its gradients, and training equal one process."""

from __future__ import annotations

import functools
import re
from itertools import accumulate
from typing import Any

import pool as worker
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import RemoteError
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from training_case import WIDTH, Branch, assert_same, gradients_of

import usp
from usp.distributed.submeshes import Submeshes
from usp.testing import dense_attention

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (1, 4), (2, 3), (1, 6)]  # (ulysses, ring)
EIGHT = {"rtol": 1e-8, "atol": 1e-8}
# pairs that cost as much as tokens: lengths like those drawn go to meshes of all sizes
COST = usp.DocumentCost(token=1.0, pair=1.0, sent=0.3, hop=2.0)


@functools.cache
def meshes(ulysses: int, ring: int) -> Submeshes:
    mesh = worker.mesh(ulysses, ring)
    return usp.submeshes(mesh, cores=mesh.size)  # whatever this machine has


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 13, 29]), min_size=1, max_size=7))
    return {
        "mesh": draw(st.sampled_from(MESHES)),
        "cuts": (0, *accumulate(lengths)),
        "heads": (kv_heads * draw(st.integers(1, 2)), kv_heads),
        "dims": draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([(None, None), (2, 3)])),
        "transport": draw(st.sampled_from(["auto", "ring", "direct"])),
        "most": draw(st.sampled_from([None, 40])),
    }


def tensors(case: dict[str, Any]) -> list[Tensor]:
    """q, k, v, sinks, and the gradient of the result."""
    g = torch.Generator().manual_seed(sum(case["cuts"]))
    (heads, kv_heads), (d, dv), length = case["heads"], case["dims"], case["cuts"][-1]
    shapes = [(heads, d), (kv_heads, d), (kv_heads, dv), (heads, dv)]
    q, k, v, dout = (torch.randn(2, length, *s, generator=g, dtype=torch.float64) for s in shapes)
    sinks = torch.randn(heads, generator=g, dtype=torch.float64)
    return [*(x.requires_grad_() for x in (q, k, v, sinks)), dout]


def run(case: dict[str, Any]) -> list[Tensor]:
    """The whole result, and this rank's gradients."""
    schedule = usp.schedule_documents(
        case["cuts"], meshes(*case["mesh"]), COST, most_tokens=case["most"]
    )
    *inputs, sinks, dout = tensors(case)
    q, k, v = (schedule.shard(x, 1) for x in inputs)
    assert len(schedule.positions) == q.shape[1] <= (case["most"] or q.shape[1])
    options = {"causal": case["causal"], "window_size": case["window"]}
    out = schedule.attention(q, k, v, sinks=sinks, transport=case["transport"], **options)
    whole = schedule.unshard(out, 1)
    assert torch.equal(schedule.shard(whole, 1), out)
    size = len(schedule.degrees.loads)
    gradients = torch.autograd.grad((whole * dout).sum() / size, [*inputs, sinks])
    return [whole.detach(), *gradients]


def expected(case: dict[str, Any]) -> list[Tensor]:
    *inputs, sinks, dout = tensors(case)
    out, _ = dense_attention(
        *inputs,
        cu_seqlens=case["cuts"],
        causal=case["causal"],
        window_size=case["window"],
        sinks=sinks,
    )
    return [out.detach(), *torch.autograd.grad((out * dout).sum(), [*inputs, sinks])]


@settings(max_examples=settings.default.max_examples // 3)
@given(case=cases())
def test_attention_on_submeshes_equals_one_device(pool, case: dict[str, Any]) -> None:
    ulysses, ring = case["mesh"]
    fits = case["most"] is None or sum(-(-n // (ulysses * ring)) for n in _lengths(case)) <= 40
    if not fits:
        return
    results = pool.run(run, case, ranks=ulysses * ring)
    out, *gradients = expected(case)
    for whole, *_ in results:
        torch.testing.assert_close(whole, out, **EIGHT)
    for found, wanted in zip(zip(*(r[1:] for r in results), strict=True), gradients, strict=True):
        torch.testing.assert_close(sum(found), wanted, **EIGHT)  # ranks add


def _lengths(case: dict[str, Any]) -> list[int]:
    return [b - a for a, b in zip(case["cuts"], case["cuts"][1:], strict=False)]


class Stack(nn.Module):
    """Two attention layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Branch() for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


CUTS = (0, 3, 63, 64, 94, 102, 112, 130, 132)


def stack(attend: Any) -> Stack:
    torch.manual_seed(0)
    model = Stack().double()
    for branch in model.branches:
        branch.attend = attend
    return model


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, CUTS[-1], WIDTH, generator=g, dtype=torch.float64)
    return x, torch.randint(5, (1, CUTS[-1]), generator=g)


def train(fsdp: bool) -> dict[str, Tensor]:
    schedule = usp.schedule_documents(CUTS, meshes(1, 4), COST)
    assert len({at.degree for at in schedule.degrees.placed}) == 3  # 4, 2 and 1
    model, (x, labels) = stack(functools.partial(schedule.attention, causal=True)), batch()
    for module in (*model.branches, model) if fsdp else ():
        fully_shard(module)
    logits = model(schedule.shard(x, 1)).flatten(0, 1)
    lost = nn.functional.cross_entropy(logits, schedule.shard(labels, 1)[0], reduction="sum")
    (lost / labels.numel() * (4 if fsdp else 1)).backward()  # FSDP averages
    if not fsdp:
        usp.all_reduce_gradients(model, schedule.mesh)
    return gradients_of(model)


@pytest.mark.parametrize("fsdp", [False, True])
def test_training_equals_one_process(pool, fsdp: bool) -> None:
    def attend(*qkv: Tensor) -> Tensor:
        return dense_attention(*qkv, causal=True, cu_seqlens=CUTS)[0]

    model, (x, labels) = stack(attend), batch()
    nn.functional.cross_entropy(model(x)[0], labels[0]).backward()
    for found in pool.run(train, fsdp, ranks=4):
        assert_same(found, gradients_of(model))


def refused(kind: str) -> None:
    rank = worker.mesh(1, 2).rank
    cuts, most = (0, 4, 9), None
    if kind == "differ" and rank:
        cuts = (0, 5, 9)
    if kind == "room":
        most = 4
    schedule = usp.schedule_documents(cuts, meshes(1, 2), usp.DocumentCost(0, 0), most_tokens=most)
    q = torch.zeros(1, len(schedule.positions), 1, 2)
    if kind in ("length", "option"):
        schedule = usp.schedule_documents((0, 9), meshes(1, 2), COST)
        x = torch.zeros(1, len(schedule.positions) + rank * (kind == "length"), 1, 2)
        schedule.attention(x, x, x, **({"dropout_p": 0.1} if rank and kind == "option" else {}))
    if kind == "mesh":
        usp.schedule_documents(cuts, worker.mesh(1, 2), COST)  # type: ignore[arg-type]
    if kind == "list":  # on one rank: the other must hear of it
        given: Any = ["none", *meshes(1, 2)] if rank else meshes(1, 2)
        usp.schedule_documents(cuts, given, COST)
    schedule.shard(q.new_zeros(8), 0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("differ", r"cu_seqlens \(a digest\)"),
        ("room", r"9 tokens do not fit 2 ranks of 4 tokens"),
        ("option", r"not \['dropout_p'\]"),
        ("length", r"q has 5 local tokens, but .* 4 of 9 tokens"),
        ("mesh", r"must be what usp.submeshes\(mesh\) returned, .*got SequenceMesh"),
        ("list", r"which says who shares cores, got list"),
        ("", r"x has 8 tokens, the documents have 9"),
    ],
)
def test_refusals_on_all_ranks(pool, kind: str, message: str) -> None:
    for outcome in pool.outcomes(refused, kind, ranks=2):
        assert isinstance(outcome, RemoteError) and re.search(message, outcome.message), outcome
        assert outcome.kind in ("ValueError", "TypeError")


def a_list_of_submeshes() -> None:
    given: Any = meshes(1, 4) if worker.mesh(1, 4).rank != 3 else ["none", *meshes(1, 4)[1:]]
    usp.schedule_documents(CUTS, given, COST)


def test_a_list_that_one_rank_has_without_the_whole(pool) -> None:
    for outcome in pool.outcomes(a_list_of_submeshes, ranks=4):
        assert isinstance(outcome, RemoteError) and "got list" in outcome.message, outcome


def test_what_is_no_mesh_or_no_cost_is_refused() -> None:
    given: list[Any] = [(), [None], None, 2]
    for wrong in given:
        with pytest.raises(TypeError, match=r"must be what usp.submeshes"):
            usp.schedule_documents(CUTS, wrong, COST)
    with pytest.raises(TypeError, match=r"a usp.DocumentCost, got float"):
        usp.schedule_documents(CUTS, usp.submeshes(None), 1.0)  # type: ignore[arg-type]


def test_one_device_needs_no_ranks() -> None:
    assert usp.submeshes(None) == (None,)
    schedule = usp.schedule_documents(CUTS, usp.submeshes(None), COST)
    x = batch()[0]
    torch.testing.assert_close(schedule.unshard(schedule.shard(x, 1), 1), x)
    empty = usp.schedule_documents((0, 0), schedule.meshes, COST)
    q = torch.zeros(1, 0, 2, 3)
    assert empty.attention(q, q, torch.zeros(1, 0, 2, 5)).shape == (1, 0, 2, 5)
