"""The positions of one ring rank, as a few arithmetic runs.

A million tokens are planned by counting: nobody searches among a million numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from usp.planning.walk import along_runs, divided

# So few runs are counted one by one: all in place, as fresh memory costs more than the arithmetic.
FEW_RUNS = 4
_MOST_RUNS = 64  # of a period


@dataclass(eq=False)  # not frozen: torch 2.10 cannot trace cached properties of what is
class Positions:
    """The positions of one ring rank: a few arithmetic runs in each segment of the sequence.

    Attributes:
        start, stop: (K,) int64, run k is ``range(start, stop, stride)``; ascending.
        stride: Distance of neighbours in a run.
    """

    start: Tensor
    stop: Tensor
    stride: int

    @cached_property
    def counts(self) -> Tensor:
        """(K,) tokens of each run."""
        return (self.stop - self.start + (self.stride - 1)) // self.stride

    def __len__(self) -> int:
        return self._length

    @cached_property
    def _length(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def tensor(self) -> Tensor:
        """(n,) int64, sorted."""
        return self.written(self.start.new_empty(len(self)))

    def written(self, out: Tensor) -> Tensor:
        """The same in (n,) of any integer dtype."""
        held = self.counts > 0
        return along_runs(self.start[held], self.counts[held], self.stride, out)

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
        held = self.counts.nonzero().flatten()
        if not len(held):
            return self.start.new_empty(0)
        first, last = int(held[0]), int(held[-1])
        end = self.start[last] + self.stride * (self.counts[last] - 1)
        return torch.stack((self.start[first], end))

    @cached_property
    def period(self) -> tuple[int, int] | None:
        """After how many positions, from 0 on, runs repeat to the end, and how many these are; None
        where they do not, or are too many."""
        start, counts = self.start, self.counts
        apart, some = start.diff(), min(len(start) // 2, _MOST_RUNS)
        first = [*zip(apart[: 2 * some].tolist(), counts[: 2 * some].tolist(), strict=False)]
        for runs in range(1, some + 1):
            if first[runs:] != first[: len(first) - runs]:
                continue
            length = int(start[runs] - start[0])
            repeats = length > 0 and int(self.stop[runs - 1]) <= length
            pairs = ((each[runs:], each[:-runs]) for each in (apart, counts))
            return (length, runs) if repeats and all(torch.equal(*pair) for pair in pairs) else None
        return None

    @cached_property
    def counts_of_period(self) -> Tensor:
        """(its length + 1,) int32, how many tokens lie below each position of the first one."""
        assert self.period is not None
        length, runs = self.period
        first = Positions(self.start[:runs], self.stop[:runs], self.stride)
        counts = self.start.new_zeros(length + 1, dtype=torch.int32)
        counts[1:].index_fill_(0, first.tensor, 1)
        return counts.cumsum_(0)

    @cached_property
    def tokens_of_period(self) -> int:
        """How many."""
        return int(self.counts_of_period[-1])

    def cut(self, start: int, stop: int) -> Positions:
        """Those from the ``start``-th to before the ``stop``-th."""
        before = self.counts.cumsum(0) - self.counts
        first, last = (torch.minimum((i - before).clamp_min(0), self.counts) for i in (start, stop))
        held = last > first
        begin = self.start[held] + self.stride * first[held]
        end = begin + self.stride * (last - first)[held]
        return Positions(begin, end, self.stride)

    def count_below(
        self,
        positions: Tensor,
        out: Tensor | None = None,
        between: tuple[int, int] | None = None,
        ahead: int = 0,
    ) -> Tensor:
        """How many of this row's tokens lie below each of ``positions + ahead``, of their dtype.

        Args:
            positions: Of any shape, int32 or int64; quick where they mostly ascend.
            out: Where they go, if that is there already.
            between: None of the sums is less than the one, or more than the other.
        """
        out = torch.empty_like(positions) if out is None else out
        if not len(self):
            return out.zero_()
        if len(self.start) <= FEW_RUNS:
            few = [(start - ahead, count) for start, count in self._few]
            if between is not None:
                between = between[0] - ahead, between[1] - ahead
            self._within(positions, few[0], out, between)
            for each in few[1:]:
                out += self._within(positions, each, torch.empty_like(out), between)
            return out
        positions = positions + ahead if ahead else positions
        start, origin, most = (table.to(out.dtype) for table in self._walk)
        run = torch.searchsorted(start, positions.contiguous().flatten(), right=True)
        origin, most = (table.index_select(0, run).view_as(out) for table in (origin, most))
        divided(torch.sub(positions, origin, out=out), self.stride)
        return torch.minimum(out, most, out=out)

    @cached_property
    def _walk(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where each run begins; and of none in front of all, and of each run, the position from
        which strides count its tokens, with those of the runs before, and how many these are."""
        before, none = self.counts.cumsum(0) - self.counts, self.start.new_zeros(1)
        origin = self.start - self.stride * before - (self.stride - 1)
        return self.start, torch.cat((none, origin)), torch.cat((none, before + self.counts))

    @cached_property
    def _few(self) -> list[tuple[int, int]]:
        """Where each run begins, and its tokens."""
        return [*zip(self.start.tolist(), self.counts.tolist(), strict=True)]

    def _within(
        self, positions: Tensor, run: tuple[int, int], out: Tensor, between: tuple[int, int] | None
    ) -> Tensor:
        """How many tokens of the run lie below each position."""
        start, count = run[0] - (self.stride - 1), run[1]
        divided(torch.sub(positions, start, out=out), self.stride)
        if between is not None:
            low, high = ((end - start) // self.stride for end in between)
            if low >= 0 and high <= count:
                return out
        return out.clamp_(0, count)
