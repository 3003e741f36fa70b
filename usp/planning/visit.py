"""What one call of a kernel visits: some queries, some keys, and for each query an interval."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Span:
    """For each local query row the local keys ``[first, stop)`` it sees.

    Attributes:
        first, stop: (Lq,) int32 on CPU, non-decreasing, first <= stop; (bands, Lq) where a visit
            has several.
    """

    first: Tensor
    stop: Tensor

    @cached_property
    def pairs(self) -> int:
        """Number of visible (query, key) pairs."""
        return int((self.stop - self.first).sum(dtype=torch.int64))

    @property
    def is_empty(self) -> bool:
        """Whether nobody sees anything; as soon as somebody does, the others are not looked at."""
        return torch.equal(self.first, self.stop)

    @cached_property
    def _on_device(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``first, stop`` on ``device``, copied there once."""
        if device.type == "cpu":
            return self.first, self.stop
        if device not in self._on_device:
            self._on_device[device] = (self.first.to(device), self.stop.to(device))
        return self._on_device[device]

    def forget(self) -> None:
        """Give the copies back."""
        self._on_device.clear()


def transposed(first: Tensor, stop: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """For each key the rows ``[first, stop)`` that see it, an interval too, int32.

    Args:
        first, stop: (Lq,) int32, non-decreasing: the keys that each row sees.
        num_keys: Lk.
    """
    keys = torch.arange(num_keys, dtype=first.dtype, device=first.device)
    first_row = torch.searchsorted(stop, keys, right=True, out_int32=True)
    stop_row = torch.searchsorted(first, keys, right=True, out_int32=True)
    return first_row, stop_row


@dataclass(frozen=True, eq=False)
class Visit:
    """Queries against keys that lie side by side, one interval of them for each query.

    Attributes:
        num_queries, num_keys: Rows of queries and of keys.
        span: What each query sees; None where every query sees every key. Only kernels that say so
            are given one of several disjoint bands, and only the pairs of such a visit are known.
    """

    num_queries: int
    num_keys: int
    span: Span | None

    @cached_property
    def pairs(self) -> int:
        """Visible (query, key) pairs, one at least."""
        return self.num_queries * self.num_keys if self.span is None else self.span.pairs

    @cached_property
    def seen_by(self) -> Span | None:
        """For each key the rows that see it; None where all do."""
        if self.span is None:
            return None
        return Span(*transposed(self.span.first, self.span.stop, self.num_keys))

    def split(self, most: int) -> tuple[Visit, ...]:
        """Visits of at most so many bands each, at least 1."""
        if self.span is None or self.span.first.dim() == 1:
            return (self,)
        starts = range(0, len(self.span.first), most)
        bands = [slice(i, i + most) if most > 1 else i for i in starts]
        spans = [Span(self.span.first[at], self.span.stop[at]) for at in bands]
        return tuple(Visit(self.num_queries, self.num_keys, span) for span in spans)

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """The visit as legal calls of a library."""
        return tuple(_tiles(self))


def whole_visit(num_queries: int, num_keys: int) -> Visit:
    """Every query sees every key."""
    return Visit(num_queries, num_keys, None)


@dataclass(frozen=True)
class Tile:
    """A rectangle of scores with at most a diagonal band, one legal call of a library.

    Rows ``[q0, q1)``, keys ``[k0, k1)``; with i and j counted from the rectangle's corner a row
    sees ``lo <= j - i <= hi``, None is no bound. Every row of a tile sees at least one key.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    lo: int | None = None
    hi: int | None = None


def _tiles(visit: Visit) -> Iterator[Tile]:
    """Cut a visit into tiles: maximal runs of rows along which each end stays or moves by one."""
    if visit.span is None:
        yield Tile(0, visit.num_queries, 0, visit.num_keys)
        return
    seeing = (visit.span.stop > visit.span.first).nonzero().flatten()
    first, stop = visit.span.first[seeing], visit.span.stop[seeing]
    start = 0
    for end in _run_ends(seeing.diff(), first.diff(), stop.diff()):
        yield _tile(int(seeing[start]), first[start:end], stop[start:end])
        start = end


def _run_ends(rows_apart: Tensor, first_moves: Tensor, stop_moves: Tensor) -> list[int]:
    """Where runs of neighbouring rows with the same moves, 0 or 1 of each end, stop."""
    legal = (rows_apart == 1) & (first_moves <= 1) & (stop_moves <= 1)
    moves = torch.where(legal, first_moves * 2 + stop_moves, -1).tolist()
    ends, run = [], None
    for row, move in enumerate(moves):
        # The first row of a run takes any legal move; the run goes on while it repeats.
        if move < 0 or (run is not None and move != run):
            ends.append(row + 1)
            run = None
        else:
            run = move
    return [*ends, len(moves) + 1]


def _tile(q0: int, first: Tensor, stop: Tensor) -> Tile:
    k0, k1 = int(first[0]), int(stop[-1])
    lo = 0 if first[-1] > first[0] else None
    hi = int(stop[0]) - k0 - 1 if stop[-1] > stop[0] else None
    return Tile(q0, q0 + len(first), k0, k1, lo, hi)
