"""Cutting and joining sequences: positions, round trips, gradients, uneven lengths."""

from __future__ import annotations

import pool as worker
import pytest
import torch
from cases import Case, shards
from torch import Tensor

import usp

CASES = [
    Case(ulysses=2, ring=2, seq_len=16, layout="zigzag"),
    Case(ulysses=1, ring=3, seq_len=13, layout="striped"),
    Case(ulysses=3, ring=2, seq_len=17, layout="zigzag"),
    Case(ulysses=2, ring=3, seq_len=4),
    Case(ulysses=4, ring=1, seq_len=7),
    Case(ring=5, seq_len=3, layout="zigzag"),
    Case(ulysses=2, ring=2, seq_len=23, layout="documents", cu_seqlens=(0, 2, 2, 9, 23)),
    Case(ulysses=2, ring=2, seq_len=23, layout="held", counts=(0, 17, 1, 5)),
    Case(ulysses=1, ring=3, seq_len=7, layout="held", counts=(7, 0, 0)),
]
EACH = pytest.mark.parametrize("case", CASES, ids=repr)


def my_positions(case: Case) -> list[int]:
    return usp.positions(case.seq_len, worker.mesh(case.ulysses, case.ring), case.placed).tolist()


@EACH
def test_positions(pool, case: Case) -> None:
    held = pool.run(my_positions, case, ranks=case.ranks)
    assert held == shards(case, case.seq_len)
    assert sorted(position for place in held for position in place) == list(range(case.seq_len))


def whole(case: Case, dim: int) -> Tensor:
    shape = [2, 3]
    shape.insert(dim, case.seq_len)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def round_trip(case: Case, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut and join, each with the gradient of a cotangent that differs on every rank."""
    mesh, layout = worker.mesh(case.ulysses, case.ring), case.placed
    random = torch.Generator().manual_seed(10 + mesh.rank)
    x = whole(case, dim).requires_grad_()
    mine = usp.shard_sequence(x, mesh, dim, layout)
    cotangent = torch.randn(mine.shape, generator=random, dtype=mine.dtype)
    (dx,) = torch.autograd.grad(mine, x, cotangent)
    leaf = mine.detach().requires_grad_()
    joined = usp.unshard_sequence(leaf, mesh, dim, layout, seq_len=case.seq_len)
    cotangent = torch.randn(joined.shape, generator=random, dtype=mine.dtype)
    (dmine,) = torch.autograd.grad(joined, leaf, cotangent)
    return mine.detach(), dx, joined.detach(), dmine


@EACH
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cut_and_join(pool, case: Case, dim: int) -> None:
    dim = dim % 3
    x, places = whole(case, dim), shards(case, case.seq_len)
    results = pool.run(round_trip, case, dim, ranks=case.ranks)
    cotangents, total = [], torch.zeros_like(x)
    for rank, (mine, _, joined, _) in enumerate(results):
        random = torch.Generator().manual_seed(10 + rank)
        cotangents.append(torch.randn(mine.shape, generator=random, dtype=x.dtype))
        total += torch.randn(joined.shape, generator=random, dtype=x.dtype)
    for rank, (mine, dx, joined, dmine) in enumerate(results):
        index = torch.tensor(places[rank], dtype=torch.int64)
        assert torch.equal(mine, x.index_select(dim, index))
        assert torch.equal(dx, torch.zeros_like(x).index_copy(dim, index, cotangents[rank]))
        assert torch.equal(joined, x)
        # the adjoint of a gather: every rank's cotangent reaches the tokens' owner
        torch.testing.assert_close(dmine, total.index_select(dim, index), rtol=1e-12, atol=1e-12)


DTYPES = [
    torch.bool,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint64,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.complex128,
]


def joined_in(dtype: torch.dtype) -> tuple[bool, bool]:
    """Seven tokens over two ranks; the second time not contiguous, and conjugated if it can be."""
    mesh = worker.mesh(1, 2)
    bits = torch.randint(0, 2, (7, 3, 16), generator=torch.Generator().manual_seed(2))
    x = bits.to(dtype) if dtype == torch.bool else bits.to(torch.uint8).repeat(1, 1, 16).view(dtype)
    mine = x[:4] if mesh.rank == 0 else x[4:]
    first = usp.unshard_sequence(mine, mesh, 0)
    turned = mine.transpose(1, 2).conj() if dtype.is_complex else mine.transpose(1, 2)
    second = usp.unshard_sequence(turned, mesh, 0).transpose(1, 2)
    second = second.conj() if dtype.is_complex else second
    return same(first, x), same(second, x)


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit: some dtypes cannot be compared."""
    a, b = (x.resolve_conj().contiguous().view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_joins_any_dtype(pool, dtype: torch.dtype) -> None:
    """Also those that gloo does not know."""
    assert pool.run(joined_in, dtype, ranks=2) == [(True, True)] * 2


def test_one_device_holds_everything() -> None:
    x = torch.randn(2, 7)
    assert usp.positions(7, None).tolist() == list(range(7))
    assert torch.equal(usp.shard_sequence(x, None, 1), x)
    assert torch.equal(usp.unshard_sequence(x, None, 1), x)


def test_unknown_layouts_and_other_lengths() -> None:
    with pytest.raises(ValueError, match=r"diagonal.*zigzag"):
        usp.positions(7, None, "diagonal")
    with pytest.raises(ValueError, match=r"8.*7|7.*8"):
        usp.positions(7, None, usp.DocumentZigzag((0, 8)))


def joined_unasked(lengths: list[int]) -> list[bool]:
    """A length that nobody named cannot be told from this rank's tokens."""
    mesh = worker.mesh(1, 2)
    found = []
    for length in lengths:
        x = torch.randn(length, 3, generator=torch.Generator().manual_seed(length))
        mine = usp.shard_sequence(x, mesh, 0)
        found.append(torch.equal(usp.unshard_sequence(mine, mesh, 0, validate=False), x))
    return found


def test_a_length_is_never_guessed(pool) -> None:
    assert pool.run(joined_unasked, [8, 7, 1], ranks=2) == [[True] * 3] * 2
