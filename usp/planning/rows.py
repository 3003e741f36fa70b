"""Some of the rows of a block of keys: those that somebody else needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from usp.planning.walk import along_runs, parts_of


@dataclass(eq=False)  # not frozen: torch 2.10 cannot trace cached properties of what is
class Rows:
    """Runs of the rows that a rank holds.

    Attributes:
        total: Rows that are held.
        start, stop: (runs,) int64 on CPU, ascending, none empty, with rows left out between them.
    """

    total: int
    start: Tensor
    stop: Tensor

    def __len__(self) -> int:
        return self._length

    @cached_property
    def _length(self) -> int:
        return int((self.stop - self.start).sum())

    @cached_property
    def are_all(self) -> bool:
        """Whether none is left out."""
        return len(self) == self.total

    @cached_property
    def index(self) -> Tensor:
        """(n,) int64 on CPU, ascending: the rows themselves."""
        return along_runs(self.start, self.stop - self.start)

    @cached_property
    def _on_device(self) -> dict[torch.device, Tensor]:
        return {}

    def on(self, device: torch.device) -> Tensor:
        """``index`` on ``device``, copied there once."""
        if device not in self._on_device:
            self._on_device[device] = self.index.to(device)
        return self._on_device[device]

    def of(self, x: Tensor) -> Tensor:
        """(B, total, ...) -> (B, n, ...): a view where these rows lie side by side."""
        if self.are_all:
            return x
        if len(self.start) == 1:
            return x[:, int(self.start[0]) : int(self.stop[0])]
        return x.index_select(1, self.on(x.device))

    def add_to(self, total: Tensor, part: Tensor) -> None:
        """Add (B, n, ...) to those rows of (B, total, ...), in place."""
        if len(self.start) == 1:
            total[:, int(self.start[0]) : int(self.stop[0])] += part
        elif len(self):
            total.index_add_(1, self.on(total.device), part)

    def count_below(self, places: Tensor) -> Tensor:
        """How many of these rows lie below each of ``places``, int32.

        Args:
            places: (n,) int32, ascending, 0 to ``total``.
        """
        if self.are_all:
            return places
        if len(self.start) == 1:
            return (places - int(self.start[0])).clamp_(0, len(self))
        # before the first run lies one without rows
        counts = torch.cat((self.start.new_zeros(1), self.stop - self.start)).int()
        before = counts.cumsum(0, dtype=torch.int32) - counts
        start = torch.cat((self.start.new_zeros(1), self.start)).int()
        run = parts_of(start[1:], places)
        inside = torch.minimum(places - start.index_select(0, run), counts.index_select(0, run))
        return before.index_select(0, run).add_(inside)

    @cached_property
    def longest(self) -> tuple[int, int, int]:
        """Of the longest run the first row, how many of these rows are before it, and its length;
        of one at least."""
        counts = self.stop - self.start
        i = int(counts.argmax())
        return int(self.start[i]), int(counts[:i].sum()), int(counts[i])

    @property
    def skipped(self) -> int:
        """How many rows are left out before the longest run."""
        start, before, _ = self.longest
        return start - before

    def recount_(self, places: Tensor) -> None:
        """``count_below`` in place, of (n,) places that stand as if only what is ``skipped`` were
        left out: those in the longest run are right, and the others few."""
        _, before, count = self.longest
        ends = places.new_tensor((before, before + count + 1))
        low, high = torch.searchsorted(places, ends).tolist()
        for some in (places[:low], places[high:]):
            if len(some):
                some.copy_(self.count_below(some + self.skipped))

    def within(self, others: Rows) -> Rows:
        """These rows by their places among ``others``, which hold them all."""
        ends = (others.count_below(end.int()).long() for end in (self.start, self.stop))
        return Rows(len(others), *joined_runs(*ends))

    def among(self, others: Rows) -> Rows:
        """Those of these rows that are also ``others``, by their places among these."""
        ends = (others.count_below(end.int()).long() for end in (self.start, self.stop))
        return rows_between(len(others), *ends)


def all_rows(total: int) -> Rows:
    """Every row."""
    return rows_between(total, torch.tensor([0], device="cpu"), torch.tensor([total], device="cpu"))


def rows_between(total: int, start: Tensor, stop: Tensor) -> Rows:
    """The rows in any of some runs, which may be empty or overlap.

    Args:
        total: Rows that are held.
        start, stop: (runs,) int64.
    """
    held = stop > start
    return Rows(total, *merged(start[held], stop[held]))


def no_rows(total: int) -> Rows:
    """None of so many."""
    nothing = torch.empty(0, dtype=torch.int64, device="cpu")
    return Rows(total, nothing, nothing)


def union_of_rows(one: Rows, other: Rows) -> Rows:
    """The rows in either, of the same block."""
    if one.are_all or not len(other):
        return one
    if other.are_all or not len(one):
        return other
    ends = ((one.start, other.start), (one.stop, other.stop))
    if all(torch.equal(*pair) for pair in ends):
        return one
    return Rows(one.total, *merged(*map(torch.cat, ends)))


def merged(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Runs that may overlap as ascending ones with something between them."""
    start, order = start.sort(stable=True)  # of a few ascending parts: much faster
    return joined_runs(start, stop.index_select(0, order).cummax(0).values if len(stop) else stop)


def joined_runs(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Runs with ascending ends; those that touch as one."""
    apart = (start[1:] > stop[:-1]).nonzero().flatten()
    if len(apart) == len(start) - 1:
        return start, stop
    starts, stops = start[1:].index_select(0, apart), stop.index_select(0, apart)
    return torch.cat((start[:1], starts)), torch.cat((stops, stop[-1:]))
