"""What queries see of keys that are here, band by band.

Tables of millions of numbers cost the time that it takes to go through them, and fresh memory more:
so a band is counted against the keys of all owners while it is in the cache, and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from usp.planning.here import Here, Repeat
from usp.planning.masks.bands import Bands, alike, joined
from usp.planning.masks.mask import Band, Mask
from usp.planning.memory import uninitialised, zeros
from usp.planning.positions import Positions
from usp.planning.slides import Slides
from usp.planning.visit import Span, Visit, whole_visit


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
    runs, every = _RunsOf(queries, bands, key_len), {band.every for band in bands}
    ends, table = _ends_of(bands), None
    widest = [end for end in ends if len(end.band.rows) == len(queries)]
    # for all owners at once, in large pages: what nobody writes takes no memory
    room = zeros(len(here) * len(bands) * 2 * len(queries), dtype=torch.int32)
    visits: list[Visit | None] = []
    for each in here:
        if any(end.are_whole(each, len(queries)) for end in widest):
            visits.append(whole_visit(len(queries), len(each.rows)))
            continue
        repeat = each.repeat(queries, max(every)) if len(every) == 1 else None
        if repeat is not None:
            used = runs.which_see(each.count_of_all, repeat.runs + 1)
        else:
            # one table at a time: together they would take more memory than the bands do
            if each.has_table and each.table is None:
                table = each.make_table(table)
            used = runs.which_see(each.count_below, None)
        mine, room = room.tensor_split((2 * len(used) * len(queries),))
        seen = _Seen(each, len(queries), len(used), mine.view(2, -1, len(queries)), repeat)
        for i in used:
            seen.add(ends[i])
        visits.append(seen.visit)
    return visits


class _RunsOf:
    """What runs of queries may see of bands: what lies between the first end of the first query
    and the second end of the last."""

    def __init__(self, queries: Positions, bands: list[Band], key_len: int) -> None:
        counts = queries.counts[queries.counts > 0]
        self._first, self._last = counts.cumsum(0) - counts, counts.cumsum(0) - 1
        self._bands, self._key_len = bands, key_len
        self._known: dict[int | None, tuple[Tensor, Tensor]] = {}

    def which_see(self, count: Callable[[Tensor], Tensor], most: int | None) -> list[int]:
        """Bands of which some run sees something, as told by a count of keys below positions;
        looking at so many runs of each that may, or at all."""
        if most not in self._known:
            self._known[most] = self._ends(most)
        ends, may_see = self._known[most]
        low, high = count(ends.flatten(1)).view_as(ends)
        sees = (high.sub_(low) > 0).logical_and_(may_see).view(torch.int8).amax(1)
        found: list[int] = sees.nonzero().flatten().tolist()
        return found

    def _ends(self, most: int | None) -> tuple[Tensor, Tensor]:
        """(2, bands, runs) int32 positions between which lies what they see, and (bands, runs)
        bool, whether they are among those that may see something."""
        first, last, bands = self._first, self._last, self._bands
        rows = first.new_tensor([(band.rows.start, band.rows.stop) for band in bands])
        start, stop = rows.view(-1, 2, 1).unbind(1)
        if most is None or most >= len(first):
            first, last = (at.expand(len(bands), -1) for at in (first, last))
            may_see = (last >= start) & (first < stop)
        else:
            run = torch.searchsorted(last, start.contiguous()) + torch.arange(most, device="cpu")
            may_see = run < len(first)
            first, last = (at[run.clamp_max_(len(at) - 1)] for at in (first, last))
            may_see &= first < stop
        found = torch.empty((2, *first.shape), dtype=torch.int32, device="cpu")
        for ends in {id(band.ends): band.ends for band in bands}.values():
            which = first.new_tensor([i for i, band in enumerate(bands) if band.ends is ends])
            for end, at, out in zip(ends, (first, last), found, strict=True):
                at = at.index_select(0, which)
                out[which] = end.index_select(0, at.flatten()).view_as(at)
        ahead = torch.tensor([band.ahead for band in bands], dtype=torch.int32, device="cpu")
        return found.add_(ahead[:, None]).clamp_(0, self._key_len), may_see


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
        repeat: How it repeats.
    """

    def __init__(
        self,
        here: Here,
        num_queries: int,
        most: int,
        room: Tensor | None = None,
        repeat: Repeat | None = None,
    ) -> None:
        self._here, self._num_queries, self._most, self._room = here, num_queries, most, room
        self._repeat, self._is_whole, self._used = repeat, False, 0

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
        if self._repeat is not None:
            _count_repeating(here, self._repeat, band, some, counted[:, some])
        else:
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


def _count_repeating(here: Here, repeat: Repeat, band: Band, some: slice, out: Tensor) -> None:
    """How many keys that are here lie below both ends of some queries: those of the first ones are
    counted, and so many more are below those further on."""
    each, num_queries = repeat.queries, out.shape[1]
    counted = here.count_of_all(
        band.ends[:, some.start : min(some.stop, some.start + each)] + band.ahead
    )
    if not here.rows.are_all:
        counted -= here.rows.skipped
    times, rest = divmod(num_queries, each)
    whole = num_queries - rest
    if times:
        into = out[:, :whole].unflatten(1, (times, each))
        torch.add(counted[:, None], repeat.again[:times], out=into)
    if rest:
        torch.add(counted[:, :rest], repeat.keys * times, out=out[:, whole:])
    if not here.rows.are_all:
        for places in out:
            here.rows.recount_(places)
