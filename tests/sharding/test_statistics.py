"""Mean and variance over all ranks are those of the whole; so are gradients through them."""

from __future__ import annotations

from typing import Any

import pool as worker
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_cases import held
from pool import RemoteError
from torch import Tensor

import usp
from usp.testing import WireBytes

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (3, 2)]
FEW = settings(max_examples=settings.default.max_examples // 2)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Any tokens on any rank, reduced over the tokens and any other dims."""
    ulysses, ring = draw(st.sampled_from(MESHES))
    seq_len, dim = draw(st.integers(1, 17)), draw(st.integers(0, 2))
    others = draw(st.sets(st.integers(0, 2), max_size=2)) - {dim}
    dims: Any = tuple(draw(st.permutations([dim - 3 * draw(st.booleans()), *others])))
    return {
        "mesh": (ulysses, ring),
        "counts": draw(held(seq_len, ulysses * ring)),
        "dim": dim,
        "dims": dims[0] if len(dims) == 1 and draw(st.booleans()) else dims,
        "correction": draw(st.sampled_from([0, 1, 0.5])),
        "keepdim": draw(st.booleans()),
    }


def whole(case: dict[str, Any]) -> Tensor:
    shape = [2, 3]
    shape.insert(case["dim"], sum(case["counts"]))
    random = torch.Generator().manual_seed(1)
    return 5 + torch.randn(shape, generator=random, dtype=torch.float64)


def norm(x: Tensor, variance: Tensor, mean: Tensor, case: dict[str, Any]) -> Tensor:
    """A norm that looks across tokens, and a term by the mean alone."""
    if not case["keepdim"]:
        dims = case["dims"] if isinstance(case["dims"], tuple) else (case["dims"],)
        for d in sorted(d % 3 for d in dims):
            variance, mean = variance.unsqueeze(d), mean.unsqueeze(d)
    return (x - mean) / (variance + 0.1).sqrt() + mean.square() * x


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit, where there is a number."""
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def run(case: dict[str, Any]) -> list[Tensor]:
    mesh = worker.mesh(*case["mesh"])
    x = whole(case).split(case["counts"], case["dim"])[mesh.rank].clone().requires_grad_()
    options = {name: case[name] for name in ("keepdim", "correction")}
    variance, mean = usp.var_mean(x, mesh, case["dims"], **options)
    assert same(usp.var(x, mesh, case["dims"], **options), variance)
    assert same(usp.mean(x, mesh, case["dims"], keepdim=case["keepdim"]), mean)
    out = norm(x, variance, mean, case)
    dout = torch.randn_like(whole(case), dtype=torch.float64)  # seeded alike on all ranks
    dout = dout.split(case["counts"], case["dim"])[mesh.rank]
    (dx,) = torch.autograd.grad(out, x, dout)
    return [variance.detach(), mean.detach(), out.detach(), dx, dout]


@pytest.mark.filterwarnings("ignore:var_mean")  # of torch, where the divisor is not positive
@FEW
@given(cases())
def test_a_norm_across_tokens_is_that_of_the_whole(pool, case: dict[str, Any]) -> None:
    x = whole(case).requires_grad_()
    variance, mean = torch.var_mean(
        x, case["dims"], correction=case["correction"], keepdim=case["keepdim"]
    )
    out = norm(x, variance, mean, case)
    ulysses, ring = case["mesh"]
    results = list(zip(*pool.run(run, case, ranks=ulysses * ring), strict=True))
    found, dx, dout = (torch.cat(parts, case["dim"]) for parts in results[2:])
    expected = torch.autograd.grad(out, x, dout)[0]
    close = {"rtol": 1e-9, "atol": 1e-9, "equal_nan": True}
    for rank in range(ulysses * ring):
        assert same(results[0][rank], results[0][0]) and same(results[1][rank], results[1][0])
        torch.testing.assert_close(results[0][rank], variance.detach(), **close)
        torch.testing.assert_close(results[1][rank], mean.detach(), **close)
    torch.testing.assert_close(found, out.detach(), **close)
    torch.testing.assert_close(dx, expected, **close)


def far_from_zero(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mesh = worker.mesh(1, 3)
    part = usp.shard_sequence(far(dtype), mesh, 1)
    return usp.var_mean(part, mesh)


def far(dtype: torch.dtype) -> Tensor:
    """Means of 1e4 beside deviations of 1: their squares have no digits left for these."""
    x = 1e4 + torch.randn(2, 1009, 3, generator=torch.Generator().manual_seed(3))
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_means_far_from_zero(pool, dtype: torch.dtype) -> None:
    variance, mean = torch.var_mean(far(dtype).double(), 1)
    for found in pool.run(far_from_zero, dtype, ranks=3):
        assert found[0].dtype == found[1].dtype == dtype
        rtol = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found[0].double(), variance, rtol=rtol, atol=0)
        torch.testing.assert_close(found[1].double(), mean, rtol=rtol, atol=0)


def no_tokens() -> tuple[Tensor, Tensor]:
    mesh = worker.mesh(2, 1)
    return usp.var_mean(torch.zeros(2, 0, 3), mesh)


def test_nothing_at_all_is_nan_as_in_torch(pool) -> None:
    for found in pool.run(no_tokens, ranks=2):
        assert all(part.shape == (2, 3) and part.isnan().all() for part in found)


def sent() -> tuple[int, int]:
    mesh = worker.mesh(2, 2)
    x = torch.randn(2, mesh.rank, 3, requires_grad=True)
    with WireBytes() as forward:
        mean = usp.mean(x, mesh, validate=False)
    with WireBytes() as backward:
        mean.sum().backward()
    return forward.sent, backward.sent


def test_bytes(pool) -> None:
    """A part is a count, 6 means and 6 sums: first to the mesh row, then two of them to the
    other row. Back go the other row's two, then the neighbour's."""
    part = 8 * 13
    assert pool.run(sent, ranks=4) == [(3 * part, 3 * part)] * 4


def refused(options: list[dict[str, Any]], dtypes: list[torch.dtype]) -> None:
    mesh = worker.mesh(1, 2)
    usp.var_mean(
        torch.zeros(2, 3 + mesh.rank, 3, dtype=dtypes[mesh.rank]), mesh, **options[mesh.rank]
    )


FLOAT = [torch.float32] * 2
REFUSED = {
    "other dims": ([{"dim": 1}, {"dim": (1, 2)}], FLOAT, "disagree on dim"),
    "an unspread size that differs": ([{"dim": 2}] * 2, FLOAT, "disagree on dims beside those"),
    "a dim twice": ([{"dim": (1, -2)}] * 2, FLOAT, "different dims"),
    "no dim": ([{"dim": ()}, {}], FLOAT, "different dims"),
    "another dtype": ([{}, {}], [torch.float32, torch.float64], "disagree on dtype"),
    "integers": ([{}, {}], [torch.int64] * 2, "must be floating point"),
    "another correction": ([{}, {"correction": 0}], FLOAT, "disagree on correction"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusals_on_every_rank(pool, case: tuple) -> None:
    options, dtypes, said = case
    for outcome in pool.outcomes(refused, options, dtypes, ranks=2):
        assert isinstance(outcome, RemoteError) and outcome.kind == "ValueError", outcome
        assert said in outcome.message


def second_derivative() -> Tensor:
    mesh = worker.mesh(1, 3)
    x = torch.randn(1, 7, 3, dtype=torch.float64, requires_grad=True)
    part = usp.shard_sequence(x, mesh, 1)
    variance, mean = usp.var_mean(part, mesh, keepdim=True)
    (dx,) = torch.autograd.grad(((part - mean) * variance).pow(3).sum(), x, create_graph=True)
    # each rank's dx holds the gradients of its own tokens
    return torch.autograd.grad(dx.pow(2).sum(), x)[0]


def test_derivatives_of_second_order(pool) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 7, 3, dtype=torch.float64, requires_grad=True)
    variance, mean = torch.var_mean(x, 1, keepdim=True)
    (dx,) = torch.autograd.grad(((x - mean) * variance).pow(3).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(dx.pow(2).sum(), x)
    torch.testing.assert_close(sum(pool.run(second_derivative, ranks=3)), expected)


def held_by(counts: list[Any]) -> tuple[usp.Held, Any]:
    mesh = worker.mesh(2, 2)
    return usp.held(counts[mesh.rank], mesh)


def test_held_asks_the_ranks(pool) -> None:
    assert pool.run(held_by, [3, 0, 7, 1], ranks=4) == [usp.Held((3, 0, 7, 1))] * 4
    assert usp.held(5, None) == usp.Held((5,))
    for outcome in pool.outcomes(held_by, [3, 0, -7, 1], ranks=4):
        assert isinstance(outcome, RemoteError) and "0 or more, got -7" in outcome.message
