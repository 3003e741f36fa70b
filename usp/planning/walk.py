"""Walks along ascending numbers: in which run each lies, without a search for each."""

from __future__ import annotations

import torch
from torch import Tensor


def run_of_each(counts: Tensor) -> Tensor:
    """The run that each element lies in: (runs,) lengths -> (their sum,) int64."""
    return spread_over(torch.arange(len(counts), device=counts.device), counts)


def along_runs(start: Tensor, counts: Tensor, stride: int = 1) -> Tensor:
    """The numbers of ascending runs ``start, start + stride, ...`` of so many, none without any."""
    steps = torch.full((int(counts.sum()),), stride, dtype=start.dtype, device=start.device)
    if len(start):
        last = start[:-1] + stride * (counts[:-1] - 1)
        steps[counts.cumsum(0) - counts] = start - torch.cat((start.new_zeros(1), last))
    return steps.cumsum_(0)


def spread_over(values: Tensor, counts: Tensor) -> Tensor:
    """Each value as many times as its count says; twice as fast where the sum is told."""
    return values.repeat_interleave(counts, output_size=int(counts.sum()))


def parts_of(bounds: Tensor, positions: Tensor) -> Tensor:
    """How many of the bounds are not above each position, int64.

    Args:
        bounds: (n,) ascending, of the positions' dtype.
        positions: (m,) ascending.
    """
    if len(positions) < len(bounds):
        return torch.searchsorted(bounds, positions, right=True)
    below = torch.searchsorted(positions, bounds)
    ends = below.new_zeros(1), below, below.new_full((1,), len(positions))
    return run_of_each(torch.cat(ends).diff())


def each_of(table: Tensor, index: Tensor) -> Tensor:
    """``table[:, index]``, many times as fast: (n, m) by (k,) -> (n, k)."""
    found = table.new_empty((len(table), len(index)))
    for row, out in zip(table, found, strict=True):
        torch.index_select(row, 0, index, out=out)
    return found
