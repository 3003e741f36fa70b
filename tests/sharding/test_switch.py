"""Sharing another dim equals cutting the whole along it, and sends just what the formula says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pool as worker
import pytest
import torch
import torch.distributed as dist
from cases import chunks
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import RemoteError
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import usp
from usp import dsp
from usp.planning.switches import elements_sent
from usp.testing import WireBytes

DTYPES = [torch.float64, torch.bfloat16, torch.float32, torch.int64, torch.bool, torch.complex64]


@dataclass(frozen=True)
class Case:
    """A tensor that is shared along ``src`` and comes to be shared along ``dst``."""

    ulysses: int
    ring: int
    shape: tuple[int, ...]
    src: int
    dst: int
    dtype: torch.dtype = torch.float64
    strided: bool = False
    named: bool = True

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring

    def part(self, x: Tensor, dim: int, rank: int) -> Tensor:
        rows = chunks(x.shape[dim], self.ring)[rank // self.ulysses]
        rows = [rows[i] for i in chunks(len(rows), self.ulysses)[rank % self.ulysses]]
        return x.index_select(dim, torch.tensor(rows, dtype=torch.int64))

    def whole(self, seed: int = 0) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=random, dtype=torch.float64) * 8
        return (x > 0) if self.dtype == torch.bool else x.to(self.dtype)


@st.composite
def cases(draw: st.DrawFn, meshes: list[tuple[int, int]]) -> Case:
    ulysses, ring = draw(st.sampled_from(meshes))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 8]), min_size=2, max_size=5))
    src, dst, *_ = draw(st.permutations(range(len(shape))))
    dtype = draw(st.sampled_from(DTYPES))
    return Case(
        ulysses, ring, tuple(shape), src, dst, dtype, draw(st.booleans()), draw(st.booleans())
    )


def run(case: Case) -> tuple[Tensor, Tensor | None]:
    """On a worker: the switch, and the gradient of a cotangent cut from one of the whole."""
    mesh = worker.mesh(case.ulysses, case.ring)
    x = case.part(case.whole(), case.src, mesh.rank)
    if case.strided:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    differentiable = case.dtype.is_floating_point or case.dtype.is_complex
    x.requires_grad_(differentiable)
    seq_len = case.shape[case.src] if case.named else None
    out = dsp.switch(x, case.src - len(case.shape), case.dst, mesh, seq_len)
    if not differentiable:
        return out, None
    (dx,) = torch.autograd.grad(out, x, case.part(case.whole(1), case.dst, mesh.rank))
    return out.detach(), dx


def judge(pool, case: Case) -> None:
    for rank, (out, dx) in enumerate(pool.run(run, case, ranks=case.ranks)):
        assert torch.equal(out, case.part(case.whole(), case.dst, rank))
        assert out.is_contiguous() or case.ranks == 1
        if dx is not None:
            assert torch.equal(dx, case.part(case.whole(1), case.src, rank))


@settings(max_examples=settings.default.max_examples // 6)
@given(cases([(2, 1), (1, 2)]))
def test_two_ranks(pool, case: Case) -> None:
    judge(pool, case)


@pytest.mark.long
@given(cases([(1, 1), (4, 1), (2, 2), (1, 3), (2, 3), (5, 1)]))
def test_more_ranks(pool, case: Case) -> None:
    judge(pool, case)


def sent(case: Case) -> tuple[int, int, list[str]]:
    """Bytes of a forward and of its backward, and the collectives of the forward."""
    mesh = worker.mesh(case.ulysses, case.ring)
    mesh.whole()
    x = case.part(case.whole(), case.src, mesh.rank).requires_grad_()
    seq_len = case.shape[case.src]
    with WireBytes() as forward:
        out = dsp.switch(x, case.src, case.dst, mesh, seq_len, validate=False)
    with WireBytes() as backward:
        torch.autograd.grad(out, x, out)
    return forward.sent, backward.sent, list(forward.calls.elements())


def by_hand(case: Case, src: int, dst: int) -> list[int]:
    """b t_i (S - s_i) h e."""
    x, found = case.whole(), []
    for rank in range(case.ranks):
        t, s = (case.part(x, dim, rank).shape[dim] for dim in (src, dst))
        rest = x.numel() // (x.shape[src] * x.shape[dst])
        found.append(rest * t * (x.shape[dst] - s) * x.element_size())
    return found


WIRE = [
    Case(2, 1, (2, 5, 7, 3), 1, 2),
    Case(1, 2, (1, 7, 1, 3), 1, 2, torch.bfloat16),
    pytest.param(Case(2, 2, (2, 7, 13, 3), 2, 1), marks=pytest.mark.long),
    pytest.param(Case(4, 1, (1, 3, 13, 5), 1, 2, torch.bfloat16), marks=pytest.mark.long),
]


@pytest.mark.parametrize("case", WIRE, ids=repr)
def test_bytes_are_those_of_the_formula(pool, case: Case) -> None:
    there, back, calls = zip(*pool.run(sent, case, ranks=case.ranks), strict=True)
    assert list(there) == by_hand(case, case.src, case.dst)
    assert list(back) == by_hand(case, case.dst, case.src)
    assert calls == (["alltoall_base_"],) * case.ranks
    elements = elements_sent(case.shape, case.src, case.dst, (case.ring, case.ulysses))
    assert [n * case.dtype.itemsize for n in elements] == list(there)


def second_derivative() -> Tensor:
    mesh = worker.mesh(2, 1)
    x = Case(2, 1, (3, 5, 2), 0, 1).whole().requires_grad_()
    out = dsp.switch(dsp.split(x, 0, mesh), 0, 1, mesh)
    (dx,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(dx.pow(2).sum(), x)[0]


def test_derivatives_of_second_order(pool) -> None:
    x = Case(2, 1, (3, 5, 2), 0, 1).whole().requires_grad_()
    (dx,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(dx.pow(2).sum(), x)
    found = sum(pool.run(second_derivative, ranks=2))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def there_and_back() -> bool:
    """``split`` and ``gather`` are each other's adjoint, and switches between change nothing."""
    mesh = worker.mesh(1, 2)
    x = Case(1, 2, (3, 5, 2), 0, 1).whole().requires_grad_()
    part = dsp.switch(dsp.split(x, 0, mesh), 0, 1, mesh, 3)
    whole = dsp.gather(part, 1, mesh, 5)
    (dx,) = torch.autograd.grad(whole.square().sum() / mesh.size, x)
    mine = torch.zeros(3, 1, 1).index_fill(0, usp.positions(3, mesh), 1)
    return torch.equal(whole, x) and torch.equal(dx, 2 * x * mine)


def test_split_switch_gather(pool) -> None:
    assert pool.run(there_and_back, ranks=2) == [True, True]


def refused(options: list[dict[str, Any]]) -> None:
    mesh = worker.mesh(1, 2)
    given = {"x": torch.zeros(2, 4 - mesh.rank, 5), "src_dim": 1, "dst_dim": 2, "mesh": mesh}
    dsp.switch(**(given | options[mesh.rank]))


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "one dim": ([{"dst_dim": -2}, {}], r"src_dim 1 and dst_dim -2 are one dim.*\(2, 4, 5\)"),
    "no such dim": ([{"dst_dim": 3}, {}], "no dim 3"),
    "half a dim": ([{}, {"src_dim": 1.5}], "dim must be an integer"),
    "no tensor": ([{"x": [1.0]}, {}], "x must be a tensor"),
    "another length": ([{"seq_len": 9}] * 2, "tokens along dim 1, but .* of 9: pass seq_len="),
    "other lengths": ([{"seq_len": 7}, {}], "disagree on seq_len: rank 0 has 7, rank 1 has not"),
    "other shares": ([{}, {"x": torch.zeros(2, 9, 5)}], "gives rank 0 7 of them and not 4"),
    "another whole dim": ([{}, {"x": torch.zeros(2, 3, 6)}], "dims beside the sequence"),
    "another dim": ([{}, {"dst_dim": 0}], r"disagree on src_dim and dst_dim: rank 0 has \(1, 2\)"),
    "another dtype": ([{}, {"x": torch.zeros(2, 3, 5).half()}], "disagree on dtype"),
    "a word": ([{"validate": "yes"}, {}], "validate must be True or False"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusals_on_every_rank(pool, case: tuple) -> None:
    options, said = case
    for outcome in pool.outcomes(refused, options, ranks=2):
        assert isinstance(outcome, RemoteError), outcome
        assert outcome.kind in ("ValueError", "TypeError")
        assert re.search(said, outcome.message), outcome.message


def test_one_device() -> None:
    x = torch.randn(2, 7, 3)
    assert dsp.switch(x, 0, 1, None) is x
    assert torch.equal(dsp.gather(dsp.split(x, 1, None), 1, None, 7), x)
    with pytest.raises(ValueError, match=r"7 tokens.*8 of 8"):
        dsp.switch(x, 1, 2, None, 8)
    with pytest.raises(ValueError, match="are one dim"):
        dsp.switch(x, 1, 1, None)
    with pytest.raises(TypeError, match="mesh must be a SequenceMesh"):
        dsp.switch(x, 1, 2, "ring")  # type: ignore[arg-type]


def among_some(order: list[int]) -> tuple[Tensor, Tensor] | None:
    """On a mesh of some ranks of the world, which stand in another order than in it."""
    table = torch.tensor(order).view(2, 2)
    groups = [(line, dist.new_group(line)) for line in [*table.T.tolist(), *table.tolist()]]
    if dist.get_rank() not in order:
        return None
    mine = [group for line, group in groups if dist.get_rank() in line]
    names = ("ring", "ulysses")
    on = DeviceMesh.from_group(mine, "cpu", mesh=table, mesh_dim_names=names)
    mesh = usp.SequenceMesh.from_device_mesh(on)
    x = Case(2, 2, (2, 7, 5), 1, 2).whole()
    out = dsp.switch(dsp.split(x, 1, mesh), 1, 2, mesh, 7)
    again = dsp.switch(dsp.switch(out, 2, 1, mesh, 5), 1, 2, mesh, 7)
    return out - dsp.split(x, 2, mesh), again - out


@pytest.mark.long
@pytest.mark.parametrize("order", [[0, 1, 2, 4], [0, 2, 1, 4]], ids=str)
def test_some_ranks_of_the_world(pool, order: list[int]) -> None:
    for rank, found in enumerate(pool.run(among_some, order, ranks=5)):
        assert (found is None) == (rank not in order)
        assert found is None or not torch.cat([x.flatten() for x in found]).any()
