"""Taking a few rows and rolling all of them equals torch on the whole, and sends just that."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pool as worker
import pytest
import torch
from cases import Case, shards
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_cases import documents, held
from pool import RemoteError
from torch import Tensor

import usp
from usp.testing import WireBytes

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (2, 3), (3, 2)]
LAYOUTS = ["contiguous", "zigzag", "striped", "documents", "held"]
WIDTH = 5
FEW = settings(max_examples=settings.default.max_examples // 2)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A sequence on a mesh, of any length and layout; ranks without tokens among them."""
    ulysses, ring = draw(st.sampled_from(MESHES))
    seq_len = draw(st.one_of(st.sampled_from([1, 2, 3, 7, 13, 23]), st.integers(0, 24)))
    return Case(
        ulysses=ulysses,
        ring=ring,
        seq_len=seq_len,
        layout=draw(st.sampled_from(LAYOUTS)),
        cu_seqlens=draw(documents(seq_len)),
        counts=draw(held(seq_len, ulysses * ring)),
        seed=draw(st.integers(0, 3)),
    )


def whole(case: Case, dim: int) -> Tensor:
    shape = [2, WIDTH]
    shape.insert(dim, case.seq_len)
    random = torch.Generator().manual_seed(case.seed)
    return torch.randn(shape, generator=random, dtype=torch.float64)


def cotangent(like: Tensor, rank: int) -> Tensor:
    random = torch.Generator().manual_seed(100 + rank)
    return torch.randn(like.shape, generator=random, dtype=like.dtype)


def part(case: Case, rank: int, x: Tensor, dim: int) -> Tensor:
    return x.index_select(dim, torch.tensor(shards(case, case.seq_len)[rank], dtype=torch.int64))


def run(case: Case, name: str, dim: int, given: Any, named: bool) -> tuple[Tensor, Tensor]:
    """On a worker: the result, and the gradient of a cotangent that differs on every rank."""
    mesh = worker.mesh(case.ulysses, case.ring)
    x = part(case, mesh.rank, whole(case, dim), dim).requires_grad_()
    seq_len = case.seq_len if named else None
    out = getattr(usp, name)(x, mesh, given, dim, case.placed, seq_len)
    (dx,) = torch.autograd.grad(out, x, cotangent(out, mesh.rank))
    return out.detach(), dx


@FEW
@given(cases(), st.integers(0, 2), st.booleans(), st.data())
def test_take(pool, case: Case, dim: int, named: bool, data: st.DataObject) -> None:
    position = st.integers(-case.seq_len, case.seq_len - 1)
    rows = data.draw(st.lists(position, max_size=6)) if case.seq_len else []
    x = whole(case, dim).requires_grad_()
    out = x.index_select(dim, torch.tensor([row % len(range(case.seq_len)) for row in rows]).long())
    ranks = range(case.ranks)
    (dx,) = torch.autograd.grad(out, x, sum(cotangent(out, rank) for rank in ranks))
    results = pool.run(run, case, "take", dim, rows, named, ranks=case.ranks)
    for rank, (found, gradient) in enumerate(results):
        assert torch.equal(found, out)
        torch.testing.assert_close(gradient, part(case, rank, dx, dim), rtol=1e-12, atol=1e-12)


@FEW
@given(cases(), st.integers(0, 2), st.booleans(), st.integers(-30, 30))
def test_roll(pool, case: Case, dim: int, named: bool, shift: int) -> None:
    x = whole(case, dim)
    out = x.roll(shift, dim)
    results = pool.run(run, case, "roll", dim, shift, named, ranks=case.ranks)
    dout = torch.empty_like(x)
    for rank, (found, _) in enumerate(results):
        assert torch.equal(found, part(case, rank, out, dim))
        held = torch.tensor(shards(case, case.seq_len)[rank], dtype=torch.int64)
        dout.index_copy_(dim, held, cotangent(found, rank))
    for rank, (_, gradient) in enumerate(results):
        assert torch.equal(gradient, part(case, rank, dout.roll(-shift, dim), dim))


def sent(case: Case, name: str, given: Any) -> tuple[int, int]:
    """Bytes of a forward and of its backward."""
    mesh = worker.mesh(case.ulysses, case.ring)
    x = part(case, mesh.rank, whole(case, 1), 1).requires_grad_()
    with WireBytes() as forward:
        out = getattr(usp, name)(x, mesh, given, 1, case.placed, case.seq_len, validate=False)
    with WireBytes() as backward:
        torch.autograd.grad(out, x, out)
    return forward.sent, backward.sent


def take_bytes(case: Case, rows: list[int]) -> list[tuple[int, int]]:
    """By hand: each row that somebody asked for, once, to each rank of the axis."""
    asked, held = {row % case.seq_len for row in rows}, shards(case, case.seq_len)
    own = [len(asked & set(shard)) for shard in held]
    u, width = case.ulysses, 2 * WIDTH * 8
    in_row = [sum(own[rank // u * u : rank // u * u + u]) for rank in range(case.ranks)]
    return [
        ((n * (u - 1) + row * (case.ring - 1)) * width, (len(asked) - n) * width)
        for n, row in zip(own, in_row, strict=True)
    ]


def roll_bytes(case: Case, shift: int) -> list[int]:
    """By hand: each token along the ulysses axis if its place in the row changes, then along the
    ring if its row does."""
    owner = {p: rank for rank, shard in enumerate(shards(case, case.seq_len)) for p in shard}
    bytes_of = [0] * case.ranks
    for position, rank in owner.items():
        to = owner[(position + shift) % case.seq_len]
        between = rank // case.ulysses * case.ulysses + to % case.ulysses
        bytes_of[rank] += (between != rank) * 2 * WIDTH * 8
        bytes_of[between] += (to != between) * 2 * WIDTH * 8
    return bytes_of


EXAMPLES = [
    Case(ulysses=2, ring=2, seq_len=23, layout="zigzag"),
    Case(ulysses=1, ring=3, seq_len=13, layout="held", counts=(9, 0, 4)),
    Case(ulysses=3, ring=2, seq_len=17),
    Case(ulysses=2, ring=1, seq_len=7, layout="striped"),
]
EACH = pytest.mark.parametrize("case", EXAMPLES, ids=repr)


@EACH
@pytest.mark.parametrize("rows", [[0], [0, -1, 3, 3, 5]], ids=str)
def test_take_sends_the_rows_alone(pool, case: Case, rows: list[int]) -> None:
    assert pool.run(sent, case, "take", rows, ranks=case.ranks) == take_bytes(case, rows)


@EACH
@pytest.mark.parametrize("shift", [1, -2, 6])
def test_roll_sends_what_changes_rank(pool, case: Case, shift: int) -> None:
    there, back = zip(*pool.run(sent, case, "roll", shift, ranks=case.ranks), strict=True)
    assert list(there) == roll_bytes(case, shift)
    assert list(back) == roll_bytes(case, -shift)
    assert sum(there) > 0


def second_derivatives(name: str, given: Any) -> Tensor:
    mesh = worker.mesh(2, 2)
    x = whole(EXAMPLES[0], 1).requires_grad_()
    mine = usp.shard_sequence(x, mesh, 1, "zigzag")
    out = getattr(usp, name)(mine, mesh, given, layout="zigzag")
    (dx,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(dx.pow(2).sum(), x)[0]


def test_derivatives_of_second_order(pool) -> None:
    x = whole(EXAMPLES[0], 1).requires_grad_()
    by_name: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
        "roll": (5, lambda x: x.roll(5, 1).pow(3).sum()),
        "take": ([3, 0], lambda x: 4 * x[:, [3, 0]].pow(3).sum()),  # on each of four ranks
    }
    for name, (given_, loss) in by_name.items():
        (dx,) = torch.autograd.grad(loss(x), x, create_graph=True)
        (expected,) = torch.autograd.grad(dx.pow(2).sum(), x)
        # each rank's gradient of x is that of its own tokens
        found = sum(pool.run(second_derivatives, name, given_, ranks=4))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def labels() -> list[int]:
    mesh = worker.mesh(1, 3)
    mine = usp.shard_sequence(torch.arange(7), mesh, 0, "zigzag")
    return usp.roll(mine, mesh, -1, 0, "zigzag").tolist()


def test_numbers_without_gradients(pool) -> None:
    assert pool.run(labels, ranks=3) == [[1, 2, 0], [3, 6], [4, 5]]


def refused(name: str, given: list[Any], options: list[dict[str, Any]]) -> None:
    mesh = worker.mesh(1, 2)
    x = torch.zeros(1, 4 - mesh.rank, 3)
    getattr(usp, name)(x, mesh, given[mesh.rank], **options[mesh.rank])


REFUSED = {
    "a row that is not there": ("take", [[7], [7]], [{}, {}], "no row 7 in a sequence of 7"),
    "one before the first": ("take", [[0, -8], [0, -8]], [{}, {}], "no row -8"),
    "a float": ("take", [[0], [1.0]], [{}, {}], "a row must be an integer"),
    "no list": ("take", [0, [0]], [{}, {}], "rows must be a list of positions"),
    "other rows": ("take", [[0], [1]], [{}, {}], "disagree on rows"),
    "another shift": ("roll", [1, 2], [{}, {}], "disagree on shift: rank 0 has 1, rank 1 has 2"),
    "half a shift": ("roll", [1, 0.5], [{}, {}], "shift must be an integer"),
    "another length": ("roll", [1, 1], [{"seq_len": 9}] * 2, "tokens along dim 1.* of 9: pass"),
    "no such dim": ("roll", [1, 1], [{"dim": 3}, {}], "no dim 3"),
    "a layout for more ranks": (
        "take",
        [[0], [0]],
        [{"layout": usp.Held((4, 3, 0))}] * 2,
        "3 rank",
    ),
    "other tokens": ("take", [[0], [0]], [{"layout": usp.Held((3, 4))}] * 2, "tokens along dim 1"),
    "a word": ("roll", [1, 1], [{"validate": "yes"}, {}], "validate must be True or False"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusals_on_every_rank(pool, case: tuple) -> None:
    name, given_, options, said = case
    for outcome in pool.outcomes(refused, name, given_, options, ranks=2):
        assert isinstance(outcome, RemoteError), outcome
        assert outcome.kind in ("ValueError", "TypeError")
        assert re.search(said, outcome.message), outcome.message


def test_one_device() -> None:
    x = torch.randn(2, 7, 3)
    assert torch.equal(usp.take(x, None, (-1, 2)), x[:, [-1, 2]])
    assert torch.equal(usp.take(x, None, torch.tensor([3]), 0 - 2), x[:, [3]])
    assert torch.equal(usp.roll(x, None, 9), x.roll(9, 1))
    assert usp.roll(x[:, :0], None, 2).shape == (2, 0, 3)
    with pytest.raises(ValueError, match="no row 7"):
        usp.take(x, None, [7])
    with pytest.raises(ValueError, match=r"7 tokens.*8 of 8"):
        usp.roll(x, None, 1, seq_len=8)
