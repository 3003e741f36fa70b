"""What queries see of keys that are here, band by band.

Tables of millions of numbers cost the time that it takes to go through them, and fresh memory more:
so a band is counted against the keys of all owners while it is in the cache, and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from usp.planning.masks.bands import Bands, alike, joined
from usp.planning.masks.mask import Band, Mask
from usp.planning.memory import uninitialised, zeros
from usp.planning.positions import FEW_RUNS, Positions
from usp.planning.rows import Rows
from usp.planning.slides import Slides
from usp.planning.table import Table
from usp.planning.visit import Span, Visit, whole_visit
from usp.planning.walk import pieces_of_each

# A table pays from so many look-ups on: one for so many positions of its.
_POSITIONS_A_LOOK_UP = 16


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
        self.table: Table | None = None
        self.has_table = False

    @cached_property
    def ends(self) -> list[int]:
        """Position of the owner's first key and of its last."""
        ends: list[int] = self.keys.ends.tolist()
        return ends

    @cached_property
    def _runs(self) -> Positions:
        """The keys that are here."""
        return some_of(self.keys, self.rows)

    def expect(self, bands: int) -> None:
        """Decide on a table for so many bands."""
        pays = self._look_ups * bands * _POSITIONS_A_LOOK_UP >= self._key_len
        self.has_table = pays and len(self.rows) > 0 and len(self._runs.start) > FEW_RUNS

    def count_below(
        self,
        positions: Tensor,
        out: Tensor | None = None,
        between: tuple[int, int] | None = None,
        ahead: int = 0,
    ) -> Tensor:
        """``Positions.count_below`` of the keys that are here, of (2, n) int32; from a table no
        sum may be below 0 or above the keys."""
        if not self.has_table:
            return self._runs.count_below(positions, out, between, ahead)
        table = (self.make_table() if self.table is None else self.table).counts(ahead)
        out = torch.empty_like(positions) if out is None else out
        for row, each in zip(positions, out, strict=True):
            torch.index_select(table, 0, row, out=each)
        return out

    def make_table(self, room: Table | None = None) -> Table:
        """The table, in the room of one that nobody needs any more."""
        self.table = Table(self._key_len) if room is None else room
        self.table.fill(self._runs)
        return self.table


def some_of(positions: Positions, rows: Rows) -> Positions:
    """The positions of some of the rows."""
    if rows.are_all:
        return positions
    held = positions.counts > 0
    start, counts = positions.start[held], positions.counts[held]
    end = counts.cumsum(0)
    # rows that lie side by side may go through several runs of positions
    first, last = (torch.searchsorted(end, at, right=True) for at in (rows.start, rows.stop - 1))
    row, run = pieces_of_each(last - first + 1)
    run += first[row]
    end, before = end[run], (end - counts)[run]
    begin, end = torch.maximum(rows.start[row], before), torch.minimum(rows.stop[row], end)
    at = start[run] + positions.stride * (begin - before)
    return Positions(at, at + positions.stride * (end - begin), positions.stride)


def seen_of(
    mask: Mask,
    queries: Positions,
    here: Sequence[Here],
    key_len: int,
    slides: Slides | None = None,
) -> list[Visit | None]:
    """What queries see of the keys of each owner, in as few bands as can be.

    Args:
        mask: Who sees whom.
        queries: Those of a row that are here.
        here: Keys of each owner.
        key_len: Keys of the whole sequence.
        slides: Of this mask, where other queries may have seen the same.
    """
    num_queries = len(queries)
    if not num_queries:
        return [None for _ in here]
    # half the memory of int64 to go through
    at = queries.written(uninitialised(num_queries, dtype=torch.int32))
    most, bands = mask.each_band(at, key_len)
    for each in here:
        each.expect(most)
    if any(each.has_table for each in here):
        return _seen_in_tables(queries, here, _standing(bands, most, num_queries), key_len)
    found: list[Visit | None] = [None] * len(here)
    if isinstance(bands, list):
        bands = [band for band in bands if len(band.rows)]
        slides = slides or Slides(key_len)
        found = [slides.visit(bands, each.keys) if each.rows.are_all else None for each in here]
    rest = {i: _Seen(here[i], num_queries, most) for i, visit in enumerate(found) if visit is None}
    for band in bands if rest else ():
        (ends,) = _ends_of([band])
        for seen in rest.values():
            seen.add(ends)
    return [visit or rest[i].visit for i, visit in enumerate(found)]


def _standing(bands: list[Band] | Iterator[Band], most: int, num_queries: int) -> list[Band]:
    """All of them at once."""
    if isinstance(bands, list):
        return bands
    room = uninitialised(most, 2, num_queries, dtype=torch.int32)
    return [band._replace(ends=r.copy_(band.ends)) for r, band in zip(room, bands, strict=True)]


def _seen_in_tables(
    queries: Positions, here: Sequence[Here], bands: list[Band], key_len: int
) -> list[Visit | None]:
    """The same where keys lie in many runs. What the queries of a run see lies between the ends
    of its first one and its last one: most bands see nothing of an owner, which is told so."""
    bands = [band for band in bands if len(band.rows)]
    if not bands:
        return [None for _ in here]
    counts = queries.counts[queries.counts > 0]
    first, last = counts.cumsum(0) - counts, counts.cumsum(0) - 1
    of_runs, may_see = _of_runs(bands, first, last)
    of_runs.clamp_(0, key_len)
    ends, table = _ends_of(bands), None
    # for all owners at once, in large pages: what nobody writes takes no memory
    room = zeros(len(here) * len(bands) * 2 * len(queries), dtype=torch.int32)
    visits: list[Visit | None] = []
    for each in here:
        if any(end.are_whole(each, len(queries)) for end in ends):
            visits.append(whole_visit(len(queries), len(each.rows)))
            continue
        # one table at a time: together they would take more memory than the bands do
        if each.has_table and each.table is None:
            table = each.make_table(table)
        low, high = each.count_below(of_runs.flatten(1)).view_as(of_runs)
        sees = (high.sub_(low) > 0).logical_and_(may_see).view(torch.int8).amax(1)
        used = sees.nonzero().flatten().tolist()
        mine, room = room.tensor_split((2 * len(used) * len(queries),))
        seen = _Seen(each, len(queries), len(used), mine.view(2, -1, len(queries)))
        for i in used:
            seen.add(ends[i])
        visits.append(seen.visit)
    return visits


def _of_runs(bands: list[Band], first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Of bands what runs of queries may see.

    Args:
        first, last: (runs,) queries of each, by their places.

    Returns:
        (2, bands, runs) int32 positions between which lies what they see, and (bands, runs) bool,
        whether they are among those that may see something.
    """
    shapes = {id(band.ends): band.ends for band in bands}
    each = [
        torch.stack([ends[0].index_select(0, first), ends[1].index_select(0, last)])
        for ends in shapes.values()
    ]
    place = {shape: i for i, shape in enumerate(shapes)}
    which = first.new_tensor([place[id(band.ends)] for band in bands])
    ahead = torch.tensor([band.ahead for band in bands], dtype=torch.int32, device="cpu")
    found = torch.stack(each, 1).index_select(1, which).add_(ahead[:, None])
    rows = [(band.rows.start, band.rows.stop) for band in bands]
    start, stop = first.new_tensor(rows).view(-1, 2, 1).unbind(1)
    return found, (last >= start) & (first < stop)


class _Ends:
    """The ends of a band, for the queries that may see something of it.

    Attributes:
        band: The band.
        first, stop: From the least to the largest, one behind it.
    """

    def __init__(self, band: Band, first: Sequence[int], stop: Sequence[int]) -> None:
        self.band = band
        self.first, self.stop = (
            range(low + band.ahead, high + band.ahead + 1) for low, high in (first, stop)
        )

    def are_whole(self, here: Here, num_queries: int) -> bool:
        """Whether all of so many queries see all keys that are here."""
        if not len(here.rows) or len(self.band.rows) < num_queries:
            return False
        return self.first[-1] <= here.ends[0] and self.stop[0] > here.ends[1]

    def queries_up_to(self, which: int, position: int) -> int:
        """Before which query its first (0) or stop (1) is not above a position."""
        rows, ends = self.band.rows, self.band.ends[which]
        some = ends[rows.start : rows.stop]
        return rows.start + int(torch.searchsorted(some, position - self.band.ahead, right=True))


def _ends_of(bands: Sequence[Band]) -> list[_Ends]:
    """Of bands which some queries may see."""
    picked = {}
    for ends in {id(band.ends): band.ends for band in bands}.values():
        rows = [band.rows for band in bands if band.ends is ends]
        at = ends.new_tensor([(each.start, each.stop - 1) for each in rows]).flatten()
        both = (end.index_select(0, at).view(-1, 2).tolist() for end in ends)
        picked[id(ends)] = zip(*both, strict=True)
    return [_Ends(band, *next(picked[id(band.ends)])) for band in bands]


class _Seen:
    """What so many queries see of the keys of one owner, of at most so many bands.

    Args:
        room: (2, most, num_queries) int32, zeros to write in.
    """

    def __init__(self, here: Here, num_queries: int, most: int, room: Tensor | None = None) -> None:
        self._here, self._num_queries, self._most, self._room = here, num_queries, most, room
        self._is_whole, self._used = False, 0

    @cached_property
    def _ends(self) -> Tensor:
        if self._room is not None:
            return self._room
        return uninitialised(2, self._most, self._num_queries, dtype=torch.int32)

    def add(self, ends: _Ends) -> None:
        """One more band."""
        here, first, stop, rows = self._here, ends.first, ends.stop, ends.band.rows
        if self._is_whole or not len(here.rows):
            return
        lowest, highest = here.ends
        if stop[-1] <= lowest or first[0] > highest:
            return
        if ends.are_whole(here, self._num_queries):
            self._is_whole = True
            return
        # the queries before these see nothing up to the owner's first key, those behind them
        # nothing from its last one on
        begin, end = rows.start, rows.stop
        if stop[0] <= lowest:
            begin = max(begin, ends.queries_up_to(1, lowest))
        if first[-1] > highest:
            end = min(end, ends.queries_up_to(0, highest))
        if begin >= end:
            return
        counted, some = self._ends[:, self._used], slice(begin, end)
        if begin and self._room is None:
            counted[:, :begin] = 0
        if end < self._num_queries:
            counted[:, end:] = len(here.rows)
        between, band = (first[0], stop[-1]), ends.band
        here.count_below(band.ends[:, some], counted[:, some], between, band.ahead)
        if not alike(*counted):
            self._used += 1
        elif self._room is not None:  # the next one takes its place
            counted.zero_()

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
