"""A tensor that knows which dim is shared: the least is switched, in graphs too."""

from __future__ import annotations

from typing import Any

import compiling
import pool as worker
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from usp import dsp
from usp.planning.switches import elements_sent, least_sent
from usp.testing import WireBytes

SHAPE = (2, 5, 7, 3, 4)
DIMS = (1, 2, 3)


@given(st.lists(st.integers(0, 9), min_size=3, max_size=5), st.sampled_from([(1, 2), (2, 3)]))
def test_the_next_dim_is_that_for_which_least_is_sent(shape: list[int], degrees: Any) -> None:
    others = range(1, len(shape))
    sent = {dim: elements_sent(shape, 0, dim, degrees) for dim in others}
    chosen = least_sent(shape, 0, list(others), degrees)
    assert all((max(sent[chosen]), sum(sent[chosen])) <= (max(x), sum(x)) for x in sent.values())
    assert elements_sent(shape, 1, 1, degrees) == (0,) * (degrees[0] * degrees[1])


def blocks(x: Tensor, mesh: Any) -> Tensor:
    """What depends on all of each dim in turn, and on where along it an item is."""
    shard = dsp.DynamicShard.split(x, DIMS, mesh, 1)
    for dim in (2, 1, 3, 4, 2):
        shard = shard.whole(dim)
        y = shard.local.cumsum(dim).movedim(2, -1) * shard.positions(2).sin()
        shard = shard.with_local(y.movedim(-1, 2))
    return shard.gather()


def run(ulysses: int, ring: int) -> tuple[Tensor, Tensor]:
    mesh = worker.mesh(ulysses, ring) if ulysses * ring > 1 else None
    x = torch.arange(840.0, dtype=torch.float64).view(SHAPE).sin().requires_grad_()
    out = blocks(x, mesh)
    (dx,) = torch.autograd.grad(out, x, torch.cos(out.detach()))
    return out.detach(), dx


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "mesh", [(2, 1), pytest.param((2, 2), marks=LONG), pytest.param((1, 3), marks=LONG)]
)
def test_blocks_along_each_dim(pool, mesh: tuple[int, int]) -> None:
    out, dx = run(1, 1)
    ranks = mesh[0] * mesh[1]
    results = pool.run(run, *mesh, ranks=ranks)
    for found, _ in results:
        torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)
    total = sum(gradient for _, gradient in results)
    torch.testing.assert_close(total / ranks, dx, rtol=1e-12, atol=1e-12)


def switches(asked: list[int]) -> list[tuple[int, int]]:
    """After each dim that is asked for: the shared one, and collectives so far."""
    shard, found = dsp.DynamicShard.split(torch.ones(SHAPE), DIMS, worker.mesh(2, 1)), []
    with WireBytes() as wire:
        for dim in asked:
            shard = shard.whole(dim)
            found.append((shard.dim, wire.calls["alltoall_base_"]))
    return found


def test_what_is_whole_is_left_alone(pool) -> None:
    # 5 and 7 are cut into 3 + 2 and 4 + 3; of 3 a rank of two would keep a third less
    wanted = [(1, 0), (1, 0), (2, 1), (2, 1), (1, 2)]
    assert pool.run(switches, [2, 4, 1, 3, -3], ranks=2) == [wanted] * 2


def refusals() -> list[str]:
    mesh, said = worker.mesh(2, 1), []
    x = torch.zeros(SHAPE)
    shard = dsp.DynamicShard.split(x, (1, 2), mesh)
    wrong: list[Any] = [
        lambda: shard.whole(1, 2),
        lambda: shard.whole(1, to=3),
        lambda: shard.whole(5),
        lambda: shard.whole(5 if mesh.rank else 1),
        lambda: shard.with_local(shard.local[:, :1]),
        lambda: dsp.DynamicShard.split(x, (1, -4), mesh),
        lambda: dsp.DynamicShard.split(x, (1, 2), mesh, 3),
        lambda: dsp.DynamicShard.split(x, (), mesh),
        lambda: dsp.DynamicShard.split(x, (1, 2), "mesh"),
        lambda: dsp.DynamicShard.of(x[:, : 3 + mesh.rank], (1, 2), mesh),
        lambda: dsp.DynamicShard.of(x[:, : 3 - mesh.rank], (1, 2), mesh, seq_len=6),
        lambda: dsp.DynamicShard.of(x[:, : 3 - mesh.rank], (1, 2 + mesh.rank), mesh),
    ]
    for each in wrong:
        try:
            each()
            said.append("nothing")
        except (ValueError, TypeError) as error:
            said.append(str(error))
    return said


def test_refusals_on_every_rank(pool) -> None:
    wanted = [
        "of dims (1, 2) none remains to be shared",
        "dim 3 is to be shared, but only dims [2] may be",
        "no dim 5",
        "no dim 5",
        "of 5 along dim 1, but the tensor holds 1",
        "dims=(1, -4), dim=None for a tensor of shape (2, 5, 7, 3, 4)",
        "dims=(1, 2), dim=3",
        "dims=(), dim=None",
        "mesh must be a SequenceMesh",
        "gives rank 0 4 of them and not 3",
        "tokens along dim 1, but layout contiguous gives it",
        "is shared: rank 0 has ((1, 2), 1), rank 1 has ((1, 3), 1)",
    ]
    for said in pool.run(refusals, ranks=2):
        for text, part in zip(said, wanted, strict=True):
            assert part in text


def of_parts() -> bool:
    mesh = worker.mesh(2, 1)
    x = torch.arange(840.0).view(SHAPE)
    whole = dsp.DynamicShard.split(x, DIMS, mesh, 2)
    asked = dsp.DynamicShard.of(whole.local, DIMS, mesh, 2)
    named = dsp.DynamicShard.of(whole.local, DIMS, mesh, -3, 7)
    found = [s.shape == SHAPE and torch.equal(s.whole(2, to=1).gather(), x) for s in (asked, named)]
    return all(found)


def test_of_what_the_ranks_hold(pool) -> None:
    assert pool.run(of_parts, ranks=2) == [True, True]


def compiled() -> list[str]:
    """What differs from eager."""
    mesh, compiler, wrong = worker.mesh(2, 1), compiling.Counting("aot_eager"), []

    def model(shard: dsp.DynamicShard) -> tuple[dsp.DynamicShard, Tensor]:
        shard = shard.with_local(shard.local * 2)
        for dim in (1, 3):
            shard = shard.whole(dim)
            shard = shard.with_local(torch.sin(shard.local).cumsum(dim))
        shard.whole(shard.dim)  # nobody needs it, and the other ranks wait for it all the same
        return shard, shard.gather().square()

    with compiling.afresh():
        fast = torch.compile(model, fullgraph=True, backend=compiler)
        for shape in (SHAPE, SHAPE, (1, 2, 1, 5, 3)):
            found = []
            for function in (fast, model):
                x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
                x.requires_grad_()
                shard, whole = function(dsp.DynamicShard.split(x, DIMS, mesh))
                (dx,) = torch.autograd.grad(whole, x, torch.cos(whole.detach()))
                found.append((shard.dim, shard.local, whole, dx))
            (dim, *ours), (other, *theirs) = found
            same = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            if dim != other or not same:
                wrong.append(f"{shape}: {dim}, {other}")
    return wrong if compiler.graphs <= 2 else [*wrong, f"{compiler.graphs} graphs"]


@LONG
def test_one_graph(pool) -> None:
    assert pool.run(compiled, ranks=2) == [[]] * 2


def test_tensors_inside_are_found() -> None:
    shard = dsp.DynamicShard.split(torch.ones(SHAPE), DIMS, None, 2)
    twice = tree_map(lambda x: x * 2, shard)
    assert twice.shape == SHAPE and twice.dim == 2 and twice.dims == DIMS
    assert torch.equal(twice.local, torch.full(SHAPE, 2.0))


@LONG
def test_one_graph_on_one_device() -> None:
    x = torch.arange(105.0).view(1, 5, 7, 3)

    def model(x: Tensor) -> Tensor:
        shard = dsp.DynamicShard.split(x, (1, 2), None).whole(1)
        return dsp.switch(shard.local * 2, 0, 1, None)

    with compiling.afresh():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), 2 * x)


def in_graphs() -> list[Any]:
    """A compiled rank beside an eager one; refusals where the graph runs; shapes alone."""
    mesh, found = worker.mesh(2, 1), []
    x = torch.arange(70.0).view(2, 5, 7)
    part = dsp.split(x, 1, mesh)

    def model(part: Tensor, seq_len: int) -> Tensor:
        return dsp.switch(part * 2, 1, 2, mesh, seq_len) + 1

    with compiling.afresh():
        fast = torch.compile(model, fullgraph=True, backend="aot_eager")
        mixed = (fast if mesh.rank else model)(part, 5)
        found.append(torch.equal(mixed, dsp.split(x, 2, mesh) * 2 + 1))
        try:
            fast(part, 6 - mesh.rank)
        except ValueError as error:
            found.append(str(error))
        with FakeTensorMode() as mode:
            fake = dsp.switch(mode.from_tensor(part), 1, 2, mesh, 5)
        found.append(tuple(fake.shape) == tuple(mixed.shape))
    return found


@LONG
def test_graphs_beside_eager_and_refused(pool) -> None:
    for mixed, said, shaped in pool.run(in_graphs, ranks=2):
        assert mixed and shaped
        assert "of 6: pass seq_len=" in said or "disagree on seq_len" in said
