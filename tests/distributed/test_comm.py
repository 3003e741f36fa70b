"""The verbs of an axis: what arrives where, uneven and empty messages, order, one rank."""

from __future__ import annotations

import pool as worker
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from usp.distributed.comm import Axis
from usp.distributed.parcel import Parcel
from usp.ops.pack import pack

ALONE = Axis(1, 0, None)
DTYPES = [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=5,
    )
)
def test_a_parcel_unpacks_what_it_packed(items: list[tuple[list[int], torch.dtype]]) -> None:
    """Any mixture of dtypes, also where one lies askew of its own alignment."""
    tensors = [(torch.randn(shape) * 50).to(dtype) for shape, dtype in items]
    # a last dim that is not contiguous
    tensors = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    parcel = Parcel.of(tensors)
    message = pack(tensors)
    assert message.dtype == torch.uint8 and message.dim() == 1
    assert message.numel() == parcel.nbytes == sum(t.numel() * t.element_size() for t in tensors)
    for sent, received in zip(tensors, parcel.read(message), strict=True):
        assert received.dtype == sent.dtype and torch.equal(received, sent)


def test_a_parcel_takes_the_odd_stride_of_a_dim_of_size_one() -> None:
    """Torch calls it contiguous, and yet it cannot be viewed as bytes."""
    askew = torch.zeros(3, dtype=torch.bool)
    odd = torch.tensor([7.0, 8.0], dtype=torch.float64).as_strided((1, 1), (2, 2))
    assert odd.is_contiguous()
    parcel = Parcel.of([askew, odd])
    assert parcel.read(pack([askew, odd]))[1].tolist() == [[7.0]]


def test_an_axis_of_one_keeps_everything_at_home() -> None:
    message, out = torch.arange(5.0), torch.empty(5)
    assert torch.equal(ALONE.shift(message, out)(), message)
    assert torch.equal(ALONE.all_gather(message, torch.empty(5), [5])(), message)
    assert torch.equal(ALONE.all_to_all(message, [5], [5]), message)
    assert torch.equal(ALONE.all_reduce(message), message)
    assert ALONE.gather_objects("x") == ["x"]


def tagged(rank: int, numel: int) -> Tensor:
    return torch.arange(numel, dtype=torch.float32) + 1000 * rank


def shifts(by: int, sizes: list[int]) -> list[bool]:
    """Two messages of uneven sizes at once: they must not be confused."""
    axis = worker.mesh(1, len(sizes)).ring
    source = (axis.rank - by) % axis.size
    outs = [torch.empty(sizes[source]), torch.empty(sizes[source] + 2)]
    waits = []
    for i, out in enumerate(outs):
        message = tagged(axis.rank + 10 * i, sizes[axis.rank] + 2 * i)
        waits.append(axis.shift(message, out, by=by))
    return [
        torch.equal(wait(), tagged(source + 10 * i, sizes[source] + 2 * i))
        for i, wait in enumerate(waits)
    ]


@pytest.mark.parametrize("by", [1, -1, 2, -2, 3])
@pytest.mark.parametrize("sizes", [[4, 4], [3, 0, 5], [1, 2, 3, 4]], ids=str)
def test_shift(pool, by: int, sizes: list[int]) -> None:
    assert pool.run(shifts, by, sizes, ranks=len(sizes)) == [[True, True]] * len(sizes)


def gathers(sizes: list[int], dtype: torch.dtype) -> Tensor:
    axis = worker.mesh(1, len(sizes)).ring
    message = tagged(axis.rank, sizes[axis.rank]).to(dtype)
    return axis.all_gather(message, torch.empty(sum(sizes), dtype=dtype), sizes)()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("sizes", [[3, 3, 3], [3, 0, 5], [0, 0, 0], [2, 1]], ids=str)
def test_all_gather(pool, sizes: list[int], dtype: torch.dtype) -> None:
    expected = torch.cat([tagged(rank, size).to(dtype) for rank, size in enumerate(sizes)])
    for whole in pool.run(gathers, sizes, dtype, ranks=len(sizes)):
        assert torch.equal(whole, expected)


def exchanges(sizes: list[list[int]]) -> Tensor:
    axis = worker.mesh(len(sizes), 1).ulysses
    send = sizes[axis.rank]
    recv = [row[axis.rank] for row in sizes]
    return axis.all_to_all(tagged(axis.rank, sum(send)), send, recv)


@pytest.mark.parametrize("sizes", [[[1, 2], [3, 0]], [[0, 0, 4], [2, 1, 0], [0, 0, 0]]], ids=str)
def test_all_to_all(pool, sizes: list[list[int]]) -> None:
    cut = [tagged(rank, sum(row)).split(row) for rank, row in enumerate(sizes)]
    for rank, received in enumerate(pool.run(exchanges, sizes, ranks=len(sizes))):
        assert torch.equal(received, torch.cat([pieces[rank] for pieces in cut]))


def sums_and_objects() -> tuple[float, list[str]]:
    axis = worker.mesh(1, 3).ring
    total = axis.all_reduce(torch.tensor([1.0 + axis.rank])).item()
    return total, axis.gather_objects(f"rank {axis.rank}")


def test_all_reduce_and_objects(pool) -> None:
    assert pool.run(sums_and_objects, ranks=3) == [(6.0, ["rank 0", "rank 1", "rank 2"])] * 3


def columns_of_a_mesh() -> tuple[list[int], list[int]]:
    mesh = worker.mesh(2, 2)
    return mesh.ring.gather_objects(dist.get_rank()), mesh.ulysses.gather_objects(dist.get_rank())


def test_both_axes_of_a_mesh(pool) -> None:
    assert pool.run(columns_of_a_mesh, ranks=4) == [
        ([0, 2], [0, 1]),
        ([1, 3], [0, 1]),
        ([0, 2], [2, 3]),
        ([1, 3], [2, 3]),
    ]
