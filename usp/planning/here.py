"""The keys of one owner that are here, and how many of them lie below a position."""

from __future__ import annotations

from functools import cached_property
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor

from usp.planning.positions import FEW_RUNS, Positions
from usp.planning.rows import Rows
from usp.planning.table import Table
from usp.planning.walk import divided, pieces_of_each

# A table pays from so many look-ups on: one for so many positions of its.
_POSITIONS_A_LOOK_UP = 16


class Repeat(NamedTuple):
    """What queries see some queries further on lies some keys further on.

    Attributes:
        runs, queries: After so many queries, and runs of them.
        keys: So many keys further on.
        again: (times, 1) int32, how many keys further on each time.
    """

    runs: int
    queries: int
    keys: int
    again: Tensor


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

    def repeat(self, queries: Positions, every: int) -> Repeat | None:
        """How what queries see of all keys of the owner repeats, if their ends do after any
        multiple of so many positions; None where it does not, or many of the keys are not here."""
        keys, rows = self.keys, self.rows
        if not every or not self.has_table or keys.period is None or queries.period is None:
            return None
        times, rest = divmod(len(keys.start), keys.period[1])
        apart = lcm(every, keys.period[0], queries.period[0])
        if rest or times * keys.period[0] < self._key_len or 2 * apart > self._key_len:
            return None
        if 2 * (len(rows) - rows.longest[2]) > keys.tokens_of_period:
            return None
        of_queries = queries.tokens_of_period * (apart // queries.period[0])
        of_keys = keys.tokens_of_period * (apart // keys.period[0])
        each = torch.arange(len(queries) // of_queries, dtype=torch.int32, device="cpu")
        runs = queries.period[1] * (apart // queries.period[0])
        return Repeat(runs, of_queries, of_keys, of_keys * each[:, None])

    def count_of_all(self, positions: Tensor) -> Tensor:
        """How many of all keys of the owner, that repeat, lie below a few positions, int32."""
        assert self.keys.period is not None
        counts, length, places = (
            self.keys.counts_of_period,
            self.keys.period[0],
            positions.flatten(),
        )
        times = divided(places.clone(), length)
        found = counts.index_select(0, torch.sub(places, times, alpha=length))
        return found.add_(times, alpha=self.keys.tokens_of_period).view_as(positions)

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
