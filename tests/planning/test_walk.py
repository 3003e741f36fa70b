"""Walks along ascending numbers against a search for each; memory in large pages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from usp.planning.memory import uninitialised
from usp.planning.walk import along_runs, each_of, parts_of, spread_over

ascending = st.lists(st.integers(-3, 12), max_size=9).map(sorted)


@given(ascending, ascending, st.sampled_from([torch.int32, torch.int64]))
def test_parts_are_those_that_a_search_finds(bounds, positions, dtype) -> None:
    bounds, positions = (torch.tensor(x, dtype=dtype) for x in (bounds, positions))
    found = parts_of(bounds, positions)
    assert torch.equal(found, torch.searchsorted(bounds, positions, right=True))


@given(st.lists(st.integers(0, 4), max_size=6))
def test_values_are_spread_over_runs(counts) -> None:
    counts = torch.tensor(counts, dtype=torch.int64)
    values = torch.arange(len(counts)) * 10
    assert torch.equal(spread_over(values, counts), values.repeat_interleave(counts))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), max_size=5), st.integers(1, 3))
def test_runs_are_walked_along(runs, stride) -> None:
    expected, start = [], []
    for gap, count in runs:
        start.append(expected[-1] + 1 + gap if expected else gap)
        expected += range(start[-1], start[-1] + stride * count, stride)
    start, counts = (torch.tensor(x, dtype=torch.int64) for x in (start, [n for _, n in runs]))
    assert along_runs(start, counts, stride).tolist() == expected


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("index", [[], [2], [0, 2, 2, 4]])
def test_columns_are_those_of_indexing(rows: int, index: list[int]) -> None:
    table, columns = torch.arange(rows * 5).view(rows, 5), torch.tensor(index, dtype=torch.int64)
    found = torch.empty((rows, len(index)), dtype=table.dtype)
    each_of(table, columns, found)
    assert torch.equal(found, table[:, columns])


@pytest.mark.parametrize("columns", [0, 7, 400_001])
def test_large_tables_are_tensors_like_others(columns: int) -> None:
    table = uninitialised(2, 3, columns, dtype=torch.int32)
    assert table.shape == (2, 3, columns) and table.dtype == torch.int32
    assert table.is_contiguous() and table.device.type == "cpu"
    table[1, 2] = torch.arange(columns, dtype=torch.int32)
    kept = table[1, 2]
    del table  # the memory stays as long as any view of it
    uninitialised(2, 3, columns, dtype=torch.int32).zero_()
    assert torch.equal(kept, torch.arange(columns, dtype=torch.int32))
