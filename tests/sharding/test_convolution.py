"""A causal convolution over ranks equals its sum, token by token; bytes, refusals, graphs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate, pairwise
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

import usp
from usp.planning.shares import shares
from usp.testing import WireBytes

CHANNELS = 3


@dataclass(frozen=True)
class Case:
    """A sequence on a mesh; ``counts``: tokens of each rank."""

    ulysses: int
    ring: int
    counts: tuple[int, ...]
    taps: int = 4
    documents: tuple[int, ...] | None = None
    bias: bool = True
    seed: int = 0

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring

    @property
    def length(self) -> int:
        return sum(self.counts)

    def inputs(self) -> tuple[list[Tensor], Tensor]:
        """x, weight and bias of the whole, and a cotangent."""
        random = torch.Generator().manual_seed(self.seed)
        shapes = [(2, self.length, CHANNELS), (CHANNELS, self.taps), (CHANNELS,)]
        found = [torch.randn(s, generator=random, dtype=torch.float64) for s in shapes]
        dout = torch.randn(shapes[0], generator=random, dtype=torch.float64)
        return found[: 3 if self.bias else 2], dout

    def part(self, x: Tensor, rank: int) -> Tensor:
        start, stop = list(pairwise(accumulate(self.counts, initial=0)))[rank]
        return x[:, start:stop]

    @property
    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"layout": usp.Held(self.counts), "cu_seqlens": self.documents}
        if self.seed % 2 and self.counts == contiguous(self.length, self.ulysses, self.ring):
            options["layout"] = "contiguous"
        return options


def contiguous(length: int, ulysses: int, ring: int) -> tuple[int, ...]:
    """Tokens of each rank in that layout."""
    return tuple(shares("contiguous", length, ring, ulysses))


def run(case: Case) -> list[Tensor]:
    """On a worker: out, dx, and this rank's part of dweight and dbias."""
    return run_on(worker.mesh(case.ulysses, case.ring), case)


def run_on(mesh: usp.SequenceMesh | None, case: Case) -> list[Tensor]:
    (x, *rest), dout = case.inputs()
    rank = 0 if mesh is None else mesh.rank
    leaves = [y.clone().requires_grad_() for y in (case.part(x, rank), *rest)]
    out = usp.causal_conv1d(*leaves, mesh=mesh, **case.options)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.part(dout, rank))]


def expected(case: Case) -> list[Tensor]:
    (x, weight, *bias), dout = (each for each in case.inputs())
    leaves = [y.requires_grad_() for y in (x, weight, *bias)]
    starts = set(case.documents or (0,))
    out = []
    for t in range(case.length):
        total = x.new_zeros(2, CHANNELS) + (bias[0] if bias else 0)
        for back in range(case.taps):
            if t - back < 0:
                break
            total = total + weight[:, case.taps - 1 - back] * x[:, t - back]
            if t - back in starts:
                break
        out.append(total)
    whole = torch.stack(out, 1) if out else x * weight.sum(1) + sum(bias)
    return [whole.detach(), *torch.autograd.grad(whole, leaves, dout)]


def judge(case: Case, parts: list[list[Tensor]]) -> None:
    columns = list(zip(*parts, strict=True))
    found = [torch.cat(column, 1) for column in columns[:2]]
    found += [torch.stack(column).sum(0) for column in columns[2:]]
    for a, b in zip(found, expected(case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ulysses, ring = draw(st.sampled_from([(1, 2), (3, 1), (2, 2)]))
    length = draw(st.integers(0, 17))
    some = draw(held(length, ulysses * ring))
    counts = draw(st.sampled_from([some, contiguous(length, ulysses, ring)]))
    within = draw(st.one_of(st.none(), documents(length)))
    numbers = draw(st.integers(1, 6)), within, draw(st.booleans()), draw(st.integers(0, 9))
    return Case(ulysses, ring, counts, *numbers)


@settings(max_examples=max(settings.default.max_examples // 4, 1))
@given(cases())
def test_any_ranks_documents_and_taps(pool, case: Case) -> None:
    judge(case, pool.run(run, case, ranks=case.ranks))


@settings(max_examples=max(settings.default.max_examples // 4, 1))
@given(st.integers(0, 9), st.integers(1, 5), st.data())
def test_one_device(length: int, taps: int, data: st.DataObject) -> None:
    case = Case(1, 1, (length,), taps, data.draw(documents(length)))
    judge(case, [run_on(None, case)])


def sent(case: Case) -> tuple[int, int]:
    mesh = worker.mesh(case.ulysses, case.ring)
    mesh.whole()
    (x, weight, *_), _ = case.inputs()
    mine = case.part(x, mesh.rank).clone().requires_grad_()
    with WireBytes() as forward:
        out = usp.causal_conv1d(mine, weight, mesh=mesh, validate=False, **case.options)
    with WireBytes() as backward:
        torch.autograd.grad(out.sum(), mine)
    return forward.sent, backward.sent


def test_the_tokens_in_front_are_sent_once_and_of_the_same_document(pool) -> None:
    """By hand: (forward, backward) of each rank, in tokens."""
    wanted = {
        Case(2, 2, (50, 50, 50, 50)): [(3, 0), (3, 3), (3, 3), (0, 3)],
        Case(1, 4, (5, 1, 0, 3)): [(3 + 2, 0), (1, 3), (0, 0), (0, 3)],
        Case(4, 1, (5, 1, 0, 3), documents=(0, 3, 6, 9)): [(2, 0), (0, 2), (0, 0), (0, 0)],
        Case(4, 1, (2, 2, 2, 2), taps=1): [(0, 0)] * 4,
    }
    for case, tokens in wanted.items():
        found = pool.run(sent, case, ranks=4)
        assert found == [(a * 2 * CHANNELS * 8, b * 2 * CHANNELS * 8) for a, b in tokens]


def second(whole: bool) -> Tensor:
    mesh = None if whole else worker.mesh(1, 2)
    (x, weight, _), _ = Case(1, 2, (4, 3)).inputs()
    x.requires_grad_()
    out = usp.causal_conv1d(usp.shard_sequence(x, mesh, 1), weight, mesh=mesh)
    (dx,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(dx.pow(2).sum(), x)[0]


def test_derivatives_of_second_order(pool) -> None:
    found = sum(pool.run(second, False, ranks=2))
    torch.testing.assert_close(found, second(True), rtol=1e-11, atol=1e-11)


def in_graph(case: Case) -> int:
    """Graphs, where results are those of eager."""
    mesh = worker.mesh(case.ulysses, case.ring)
    (x, *rest), dout = case.inputs()
    compiler, results = compiling.Counting("aot_eager"), []

    def convolved(x: Tensor, *rest: Tensor) -> Tensor:
        return usp.causal_conv1d(x.sin(), *rest, mesh=mesh, **case.options).cos()

    with compiling.afresh():
        for function in (convolved, torch.compile(convolved, fullgraph=True, backend=compiler)):
            leaves = [y.clone().requires_grad_() for y in (case.part(x, mesh.rank), *rest)]
            out = function(*leaves)
            grads = torch.autograd.grad(out, leaves, case.part(dout, mesh.rank))
            results.append([out.detach(), *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    return compiler.graphs


@pytest.mark.long
def test_one_graph(pool) -> None:
    case = Case(1, 3, (5, 0, 6), documents=(0, 3, 8, 11))
    assert pool.run(in_graph, case, ranks=3) == [1] * 3


def test_autocast_is_torchs() -> None:
    x, weight = torch.randn(1, 9, CHANNELS), torch.randn(CHANNELS, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = usp.causal_conv1d(x.bfloat16(), weight)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), usp.causal_conv1d(x, weight), rtol=0.05, atol=0.05)


def refused(options: list[dict[str, Any]]) -> None:
    mesh = worker.mesh(1, 2)
    given = {"x": torch.zeros(1, 4 - mesh.rank, 3), "weight": torch.zeros(3, 4), "mesh": mesh}
    usp.causal_conv1d(**given | options[mesh.rank])


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "layout": ([{"layout": "zigzag"}] * 2, "by the order of the sequence.*got 'zigzag'"),
    "dims": ([{"x": torch.zeros(4, 3)}, {}], r"x must be \(batch, sequence, channels\)|no dim 1"),
    "channels": ([{"weight": torch.zeros(2, 4)}, {}], r"with 3 channels.*got \(2, 4\)"),
    "no tap": ([{"weight": torch.zeros(3, 0)}, {}], r"a tap or more, got \(3, 0\)"),
    "Conv1d's": ([{"weight": torch.zeros(3, 1, 4)}, {}], r"got \(3, 1, 4\)"),
    "no weight": ([{"weight": 4}, {}], "weight must be a tensor"),
    "bias": ([{"bias": torch.zeros(2)}, {}], r"bias must be \(3,\), got \(2,\)"),
    "one bias": ([{"bias": torch.zeros(3)}, {}], "disagree on bias"),
    "other taps": ([{"weight": torch.zeros(3, 3)}, {}], "disagree on taps: rank 0 has 3"),
    "dtype": ([{"weight": torch.zeros(3, 4).double()}, {}], "share a dtype"),
    "integers": ([{"x": torch.zeros(1, 4, 3).int()}, {}], "x must be fp16"),
    "documents": ([{"cu_seqlens": (0, 5)}] * 2, "must end with .* 7, got 5"),
    "other documents": ([{"cu_seqlens": (0, 2, 7)}, {}], "disagree on cu_seqlens"),
    "decreasing": ([{"cu_seqlens": (0, 2, 1, 7)}, {}], "must not decrease"),
    "length": ([{"seq_len": 9}] * 2, "holds 4 tokens .* 5 of 9|holds 3 tokens .* 4 of 9"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusals_on_every_rank(pool, case: tuple) -> None:
    options, said = case
    for outcome in pool.outcomes(refused, options, ranks=2):
        assert isinstance(outcome, RemoteError), outcome
        assert outcome.kind in ("ValueError", "TypeError")
        assert re.search(said, outcome.message), outcome.message
