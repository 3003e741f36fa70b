"""Walks along ascending numbers: in which run each lies, without a search for each."""

from __future__ import annotations

import torch
from torch import Tensor


def run_of_each(counts: Tensor) -> Tensor:
    """The run that each element lies in: (runs,) lengths -> (their sum,) int64."""
    return spread_over(torch.arange(len(counts), device=counts.device), counts)


def pieces_of_each(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Of runs in so many pieces each: the run of each piece, and which of the run's it is."""
    run = run_of_each(counts)
    before = (counts.cumsum(0) - counts).index_select(0, run)
    return run, torch.arange(len(run), device=counts.device) - before


def along_runs(start: Tensor, counts: Tensor, stride: int = 1, out: Tensor | None = None) -> Tensor:
    """The numbers of ascending runs ``start, start + stride, ...`` of so many, none without any.

    Args:
        out: (their sum,) room for them, of any integer dtype.
    """
    if out is None:
        out = start.new_empty(int(counts.sum()))
    if len(start) and len(start) * int(counts[0]) == len(out) and bool((counts == counts[0]).all()):
        steps = stride * torch.arange(int(counts[0]), dtype=out.dtype, device=out.device)
        torch.add(start[:, None].to(out.dtype), steps, out=out.view(len(start), -1))
        return out
    out.fill_(stride)
    if len(start):
        last = start[:-1] + stride * (counts[:-1] - 1)
        jumps = start - torch.cat((start.new_zeros(1), last))
        out[counts.cumsum(0) - counts] = jumps.to(out.dtype)
    return out.cumsum_(0)


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


def each_of(table: Tensor, index: Tensor, out: Tensor) -> None:
    """``out = table[:, index]``, many times as fast: (n, m) by (k,) -> (n, k)."""
    for row, into in zip(table, out, strict=True):
        torch.index_select(row, 0, index, out=into)


def divided(x: Tensor, divisor: int) -> Tensor:
    """``x //= divisor``; by a power of two a shift is many times as fast, and floors alike."""
    if divisor == 1:
        return x
    if divisor & (divisor - 1):
        return x.floor_divide_(divisor)
    return x.bitwise_right_shift_(divisor.bit_length() - 1)
