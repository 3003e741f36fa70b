"""What queries see of keys that are here, band by band.

Tables of millions of numbers cost the time that it takes to go through them, and fresh memory more:
so a band is counted against the keys of all owners while it is in the cache, and forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from usp.planning.masks.bands import Bands, joined
from usp.planning.masks.mask import Mask
from usp.planning.memory import uninitialised
from usp.planning.positions import FEW_RUNS, Positions
from usp.planning.rows import Rows
from usp.planning.visit import Span, Visit, whole_visit

# A table pays from so many look-ups on: one for so many positions of its.
_POSITIONS_A_LOOK_UP = 16
_TABLE_WIDTH = 1 << 14
_FEW_QUERIES = 256


class Here:
    """The keys of one owner that are here, to be counted below many positions.

    A few arithmetic runs are counted by a formula. Where there are more, a table of all positions
    holds the counts, or the run of each position is searched for.

    Args:
        keys: Of the owner.
        rows: Which of them are here.
        key_len: Keys of the whole sequence.
        look_ups: About how many positions will be asked for, of each band.
    """

    def __init__(self, keys: Positions, rows: Rows, key_len: int, look_ups: int) -> None:
        self.keys, self.rows = keys, rows
        self._key_len, self._look_ups = key_len, look_ups
        self._table: Tensor | None = None
        self.has_table = False

    @cached_property
    def ends(self) -> list[int]:
        """Position of the owner's first key and of its last."""
        ends: list[int] = self.keys.ends.tolist()
        return ends

    @cached_property
    def _runs(self) -> Positions | None:
        """The keys that are here, where they are few runs of all keys or of a few."""
        if self.rows.are_all:
            return self.keys
        if len(self.keys.start) <= FEW_RUNS and len(self.rows.start) <= FEW_RUNS:
            return some_of(self.keys, self.rows)
        return None

    def expect(self, bands: int) -> None:
        """Decide on a table for so many bands."""
        is_formula = self._runs is not None and len(self._runs.start) <= FEW_RUNS
        pays = self._look_ups * bands * _POSITIONS_A_LOOK_UP >= self._key_len
        self.has_table = pays and not is_formula

    def count_below(
        self,
        positions: Tensor,
        out: Tensor | None = None,
        between: tuple[int, int] | None = None,
    ) -> Tensor:
        """``Positions.count_below`` of the keys that are here.

        Args:
            positions: (2, n), int64 where there is a table; ascending unless all keys are here.
            out: (2, n), int32 where there is a table.
        """
        if self.has_table:
            table = self.make_table() if self._table is None else self._table
            return torch.gather(table.expand(2, -1), 1, positions, out=out)  # a thread for each row
        if self._runs is not None:
            return self._runs.count_below(positions, out, between)
        out = self.keys.count_below(positions, out)
        for each in out:
            each.copy_(self.rows.count_below(each))
        return out

    def make_table(self, room: Tensor | None = None) -> Tensor:
        """The table: (key_len + 1 or more,) int32, of each position how many keys are below.

        Args:
            room: Memory of a table that nobody needs any more.
        """
        at = self.keys.tensor
        if not self.rows.are_all:
            at = at.index_select(0, self.rows.index)
        if room is None:
            size = (self._key_len // _TABLE_WIDTH + 1) * _TABLE_WIDTH
            room = torch.empty(size, dtype=torch.int32, device="cpu")
        room.zero_()[1:].index_fill_(0, at, 1)
        parts = room.view(-1, _TABLE_WIDTH)
        # threads share rows: each begins with the keys in front of it
        starts = _TABLE_WIDTH * torch.arange(1, len(parts), device="cpu") - 1
        parts[1:, 0] += torch.searchsorted(at, starts)
        torch.cumsum(parts, 1, dtype=torch.int32, out=parts)
        self._table = room
        return room


def some_of(positions: Positions, rows: Rows) -> Positions:
    """The positions of some of the rows."""
    ends = zip(rows.start.tolist(), rows.stop.tolist(), strict=True)
    cuts = [positions.cut(*each) for each in ends] or [positions.cut(0, 0)]
    start, stop = torch.cat([c.start for c in cuts]), torch.cat([c.stop for c in cuts])
    return Positions(start, stop, positions.stride)


def seen_of(mask: Mask, queries: Tensor, here: Sequence[Here], key_len: int) -> list[Visit | None]:
    """What queries see of the keys of each owner, in as few bands as can be.

    Args:
        mask: Who sees whom.
        queries: (n,) int64 ascending positions.
        here: Keys of each owner.
        key_len: Keys of the whole sequence.
    """
    if not len(queries):
        return [None for _ in here]
    most, bands = mask.each_band(queries.int(), key_len)  # half the memory to go through
    for each in here:
        each.expect(most)
    found = [_Seen(each, len(queries), most) for each in here]
    if not any(each.has_table for each in here):
        for ends in bands:
            band = _Band(ends, ends)
            for seen in found:
                seen.add(band)
        return [seen.visit for seen in found]
    # one table at a time: together they would take more memory than the bands do
    room, index = None, queries.new_empty((2, len(queries)))
    kept = bands if len(here) == 1 else [ends.clone() for ends in bands]
    for each, seen in zip(here, found, strict=True):
        if each.has_table and len(here) > 1:
            room = each.make_table(room)
        for ends in kept:
            seen.add(_Band(ends, index.copy_(ends) if each.has_table else ends))
    return [seen.visit for seen in found]


class _Band:
    """What each query sees of a band.

    Args:
        ends: (2, n) int32, ``first`` and ``stop``.
        index: The same as tables are asked.
    """

    def __init__(self, ends: Tensor, index: Tensor) -> None:
        self.ends, self.index = ends, index
        self.first, self.stop = (range(int(end[0]), int(end[-1]) + 1) for end in ends)


class _Seen:
    """What so many queries see of the keys of one owner, of at most so many bands."""

    def __init__(self, here: Here, num_queries: int, most: int) -> None:
        self._here, self._num_queries, self._most = here, num_queries, most
        self._is_whole, self._used = False, 0

    @cached_property
    def _ends(self) -> Tensor:
        return uninitialised(2, self._most, self._num_queries, dtype=torch.int32)

    def add(self, band: _Band) -> None:
        """One more band."""
        here, first, stop = self._here, band.first, band.stop
        if self._is_whole or not len(here.rows):
            return
        lowest, highest = here.ends
        if stop[-1] <= lowest or first[0] > highest:
            return
        if first[-1] <= lowest and stop[0] > highest:
            self._is_whole = True
            return
        # the queries before these see nothing up to the owner's first key, those behind them
        # nothing from its last one on
        begin, end = 0, self._num_queries
        if stop[0] <= lowest:
            begin = int(torch.searchsorted(band.ends[1], lowest, right=True))
        if first[-1] > highest:
            end = int(torch.searchsorted(band.ends[0], highest, right=True))
        counted = self._ends[:, self._used]
        if begin:
            counted[:, :begin] = 0
        if end < self._num_queries:
            counted[:, end:] = len(here.rows)
        if begin < end:
            some, between = slice(begin, end), (first[0], stop[-1])
            here.count_below(band.index[:, some], counted[:, some], between)
        # what is empty for the last queries may be so for all: then the next one takes its place
        self._used += not (torch.equal(*counted[:, -_FEW_QUERIES:]) and torch.equal(*counted))

    @property
    def visit(self) -> Visit | None:
        """What was seen; None for nothing."""
        num_queries, num_keys = self._num_queries, len(self._here.rows)
        if self._is_whole:
            return whole_visit(num_queries, num_keys)
        if not self._used:
            return None
        first, stop = joined(Bands(*self._ends[:, : self._used]))
        span = Span(first, stop) if len(first) > 1 else Span(first[0], stop[0])
        return Visit(num_queries, num_keys, span)
