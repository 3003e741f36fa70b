"""The positions of one ring rank, as a few arithmetic runs.

A million tokens are planned by counting: nobody searches among a million numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from usp.planning.walk import each_of, parts_of, spread_over


@dataclass(eq=False)  # not frozen: torch 2.10 cannot trace cached properties of what is
class Positions:
    """The positions of one ring rank: in each segment of the sequence a few arithmetic runs.

    Attributes:
        bounds: (S + 1,) int64 boundaries of the segments (the documents; else one segment).
        start, stop: (S, K) int64, run k of segment s is ``range(start, stop, stride)``; ascending.
        stride: Distance of neighbours in a run.
    """

    bounds: Tensor
    start: Tensor
    stop: Tensor
    stride: int

    @cached_property
    def counts(self) -> Tensor:
        """(S, K) tokens of each run."""
        return (self.stop - self.start + (self.stride - 1)) // self.stride

    def __len__(self) -> int:
        return self._length

    @cached_property
    def _length(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def tensor(self) -> Tensor:
        """(n,) int64, sorted."""
        counts = self.counts.flatten()
        before = counts.cumsum(0) - counts
        base = spread_over(self.start.flatten() - self.stride * before, counts)
        return base + self.stride * torch.arange(len(self), device=base.device)

    @cached_property
    def _on_device(self) -> dict[torch.device, Tensor]:
        return {}

    def on(self, device: torch.device) -> Tensor:
        """``tensor`` on ``device``, int64, copied there once."""
        if device not in self._on_device:
            self._on_device[device] = self.tensor.to(device)
        return self._on_device[device]

    @cached_property
    def ends(self) -> Tensor:
        """(2,) first and last position; (0,) for an empty row."""
        held = self.counts > 0
        if not held.any():
            return self.start.new_empty(0)
        start, last = self.start[held], (self.start + self.stride * (self.counts - 1))[held]
        return torch.stack((start[0], last[-1]))

    def cut(self, start: int, stop: int) -> Positions:
        """Those from the ``start``-th to before the ``stop``-th."""
        counts = self.counts
        before = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
        first, last = (torch.minimum((i - before).clamp_min(0), counts) for i in (start, stop))
        begin = self.start + self.stride * first
        return Positions(self.bounds, begin, begin + self.stride * (last - first), self.stride)

    def segment_of(self, positions: Tensor) -> Tensor | None:
        """Segment of each position, the same for every row of a table; None if there is one.

        Args:
            positions: (n,) ascending, 0 or more.
        """
        if len(self.bounds) == 2:
            return None
        return parts_of(self.bounds[1:-1].to(positions.dtype), positions)

    def count_below(
        self, positions: Tensor, segment: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """How many of this row's tokens lie below each of ``positions``, of their dtype.

        Args:
            positions: (n,) int32 or int64, ascending, n > 0.
            segment: ``segment_of(positions)``.
            out: Where they go, if that is there already.
        """
        out = torch.empty_like(positions) if out is None else out
        if len(positions) > 1 and positions[0] == positions[-1]:
            # One end of a causal or full mask is the same for every row.
            alone = None if segment is None else segment[:1]
            return out.copy_(self.count_below(positions[:1], alone).expand_as(out))
        if segment is None:
            runs = [*zip(self.start[0].tolist(), self.counts[0].tolist(), strict=True)]
            self._within(positions, *runs[0], out)
            for run in runs[1:]:
                out += self._within(positions, *run, torch.empty_like(positions))
            return out
        per_segment = self.counts.sum(1)
        table = torch.stack((per_segment.cumsum(0) - per_segment, *self.start.T, *self.counts.T))
        below, *ends = each_of(table.to(positions.dtype), segment)
        num = len(ends) // 2
        for start, count in zip(ends[:num], ends[num:], strict=True):
            below += self._within(positions, start, count, out)
        return out.copy_(below)

    def _within(
        self, positions: Tensor, start: Tensor | int, count: Tensor | int, out: Tensor
    ) -> Tensor:
        """How many tokens of the run lie below each position.

        All in place: fresh memory costs more than the arithmetic.
        """
        torch.sub(positions, start - (self.stride - 1), out=out)
        if self.stride > 1:
            _divide(out, self.stride)
        if isinstance(count, Tensor):
            return torch.minimum(out.clamp_min_(0), count, out=out)
        return out.clamp_(0, count)


def _divide(x: Tensor, divisor: int) -> None:
    """``x //= divisor``; by a power of two a shift is many times as fast, and floors alike."""
    if divisor & (divisor - 1):
        x.floor_divide_(divisor)
    else:
        x.bitwise_right_shift_(divisor.bit_length() - 1)
