"""The head exchange: who gets which heads, there and back, exact bytes, its own adjoint."""

from __future__ import annotations

import pool as worker
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from usp.attention.ulysses import gather_heads, scatter_heads
from usp.planning.heads import Cut, kv_heads_shared, split_heads
from usp.testing import WireBytes


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 6))
def test_heads_are_dealt_out_evenly_with_the_key_heads_they_read(
    kv_heads: int, group_size: int, degree: int
) -> None:
    num_heads = kv_heads * group_size
    dealt = split_heads(num_heads, kv_heads, degree)
    held = [list(range(h.offset, h.offset + h.count)) for h in dealt]
    assert [head for mine in held for head in mine] == list(range(num_heads))
    assert max(map(len, held)) - min(map(len, held)) <= 1
    for heads, mine in zip(dealt, held, strict=True):
        read = [head // group_size for head in mine]
        first, stop = heads.kv_range
        assert list(range(first, stop)) == sorted(set(read))
        assert [first + i for i in heads.kv_index] == read
    read_by = [{head // group_size for head in mine} for mine in held]
    shared = any(a & b for i, a in enumerate(read_by) for b in read_by[:i])
    assert kv_heads_shared(dealt) == shared


# lengths of each rank, (query heads, key heads), dtype
EXCHANGES = [
    ([3, 3], (4, 2), torch.float32),
    ([4, 3, 3], (5, 5), torch.float64),
    ([2, 1, 0], (2, 1), torch.float32),
    ([1, 0, 0, 0], (7, 7), torch.bfloat16),
    ([3, 2, 2, 2], (6, 2), torch.float16),
]


def cuts(lengths: list[int], counts: tuple[int, int]) -> tuple[Cut, Cut]:
    dealt = split_heads(*counts, len(lengths))
    queries = tuple((h.offset, h.offset + h.count) for h in dealt)
    return Cut(tuple(lengths), queries), Cut(tuple(lengths), tuple(h.kv_range for h in dealt))


def whole(lengths: list[int], counts: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    shapes = [(2, sum(lengths), counts[0], 5), (2, sum(lengths), counts[1], 3)]
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]


def there(lengths: list[int], counts: tuple[int, int], dtype: torch.dtype) -> tuple:
    axis = worker.mesh(len(lengths), 1).ulysses
    mine = [x.split(lengths, 1)[axis.rank] for x in whole(lengths, counts, dtype)]
    with WireBytes() as wire:
        scattered = scatter_heads(axis, mine, cuts(lengths, counts))
    with WireBytes() as back:
        gathered = gather_heads(axis, scattered, cuts(lengths, counts))
    return scattered, gathered, (wire.sent, dict(wire.calls)), (back.sent, dict(back.calls))


@pytest.mark.parametrize(("lengths", "counts", "dtype"), EXCHANGES)
def test_there_and_back(
    pool, lengths: list[int], counts: tuple[int, int], dtype: torch.dtype
) -> None:
    tensors = whole(lengths, counts, dtype)
    exchange = cuts(lengths, counts)
    results = pool.run(there, lengths, counts, dtype, ranks=len(lengths))
    for rank, (scattered, gathered, sent, sent_back) in enumerate(results):
        there_bytes = back_bytes = 0
        for x, cut, got, home in zip(tensors, exchange, scattered, gathered, strict=True):
            first, stop = cut.heads[rank]
            assert torch.equal(got, x[:, :, first:stop])
            # a head that several ranks held comes home as their sum
            copies = torch.zeros(x.shape[2], dtype=torch.float64)
            for a, b in cut.heads:
                copies[a:b] += 1
            mine = x.split(lengths, 1)[rank].double() * copies[:, None]
            torch.testing.assert_close(home.double(), mine, rtol=1e-2, atol=1e-2)
            if x.dtype in (torch.float32, torch.float64):
                torch.testing.assert_close(home.double(), mine, rtol=1e-6, atol=1e-6)
            each = 2 * x.shape[3] * x.element_size()
            elsewhere = sum(b - a for i, (a, b) in enumerate(cut.heads) if i != rank)
            there_bytes += lengths[rank] * elsewhere * each
            back_bytes += (sum(lengths) - lengths[rank]) * (stop - first) * each
        # both tensors in one message, no byte of padding
        assert sent == (there_bytes, {"alltoall_base_": 1})
        assert sent_back == (back_bytes, {"alltoall_base_": 1})


def adjoint(lengths: list[int], counts: tuple[int, int]) -> tuple[float, float]:
    axis = worker.mesh(len(lengths), 1).ulysses
    exchange = cuts(lengths, counts)
    random = torch.Generator().manual_seed(axis.rank)
    tensors = whole(lengths, counts, torch.float64)
    mine = [x.split(lengths, 1)[axis.rank] for x in tensors]
    scattered = scatter_heads(axis, mine, exchange)
    other = [torch.randn(x.shape, generator=random, dtype=x.dtype) for x in scattered]
    gathered = gather_heads(axis, other, exchange)
    inside = sum((a * b).sum().item() for a, b in zip(scattered, other, strict=True))
    outside = sum((a * b).sum().item() for a, b in zip(mine, gathered, strict=True))
    return inside, outside


@pytest.mark.parametrize(("lengths", "counts"), [exchange[:2] for exchange in EXCHANGES])
def test_gather_is_the_adjoint_of_scatter(
    pool, lengths: list[int], counts: tuple[int, int]
) -> None:
    """<scatter(x), y> = <x, gather(y)>, summed over ranks: gather is scatter's gradient."""
    inside, outside = zip(*pool.run(adjoint, lengths, counts, ranks=len(lengths)), strict=True)
    assert sum(inside) == pytest.approx(sum(outside), rel=1e-12)
