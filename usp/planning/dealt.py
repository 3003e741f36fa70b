"""Tokens as caches hold them: runs of the sequence, each on one rank, dealt out as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import NamedTuple


class Run(NamedTuple):
    """Neighbouring tokens that one rank holds, ``range(start, stop)``."""

    owner: int
    start: int
    stop: int


@dataclass(frozen=True)
class Dealt:
    """Which rank holds which tokens of a sequence that grows at its end.

    The rules that change it know nothing but what is here, so ranks that saw the same tokens come
    agree on it without a message.

    Attributes:
        ranks: Of the mesh, counted by ``mesh.rank``.
        seq_len: Tokens that have come so far, and the position of the next.
        runs: Ascending; what lies between two of them is on no rank any more.
    """

    ranks: int
    seq_len: int = 0
    runs: tuple[Run, ...] = ()

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens on each rank."""
        counts = [0] * self.ranks
        for owner, start, stop in self.runs:
            counts[owner] += stop - start
        return tuple(counts)

    def grown(self, tokens: int, page: int) -> Dealt:
        """So many more: the rank of the last token takes on until it holds a page more than the
        one that holds least, which goes on then. Many at once come in pieces, one a rank."""
        piece = max(page, -(-tokens // self.ranks))
        counts, runs = list(self.counts), []
        owner, place, end = self._last_owner, self.seq_len, self.seq_len + tokens
        while place < end:
            room = min(counts) + piece - counts[owner]
            if room <= 0:
                owner = counts.index(min(counts))
                continue
            stop = min(end, place + room)
            runs.append(Run(owner, place, stop))
            counts[owner] += stop - place
            place = stop
        return replace(self, seq_len=end, runs=joined((*self.runs, *runs)))

    @property
    def _last_owner(self) -> int:
        return self.runs[-1].owner if self.runs else 0

    def extended(self, tokens: int, runs: Sequence[Run]) -> Dealt:
        """So many more, which lie as ``runs`` say, counted from the first of them."""
        moved = [Run(o, a + self.seq_len, b + self.seq_len) for o, a, b in sorted(runs, key=_start)]
        return replace(self, seq_len=self.seq_len + tokens, runs=joined((*self.runs, *moved)))

    def cropped(self, seq_len: int) -> Dealt:
        """The first tokens alone."""
        kept = (Run(o, a, min(b, seq_len)) for o, a, b in self.runs if a < seq_len)
        return replace(self, seq_len=seq_len, runs=tuple(kept))

    def thinned(self, first: int, stop: int, page: int) -> Dealt:
        """Without the tokens from ``first`` to before ``stop``, on ranks where these are as many
        as the others and a page: so that what is moved for it is less than what it frees."""
        left = tuple(chain(*(_outside(run, first, stop) for run in self.runs)))
        after = replace(self, runs=left)
        pays = [
            held - kept >= kept + page for held, kept in zip(self.counts, after.counts, strict=True)
        ]
        runs = chain(
            *(_outside(run, first, stop) if pays[run.owner] else [run] for run in self.runs)
        )
        return replace(self, runs=tuple(runs)) if any(pays) else self

    def indices(self, rank: int, first: int, stop: int) -> list[tuple[int, int]]:
        """Where tokens outside of ``range(first, stop)`` lie among those of a rank, as ranges."""
        found, place = [], 0
        for run in self.runs:
            if run.owner == rank:
                found += [
                    (place + a - run.start, place + b - run.start)
                    for _, a, b in _outside(run, first, stop)
                ]
                place += run.stop - run.start
        return found

    def taken(self, rank: int, first: int) -> list[tuple[int, int]]:
        """The tokens from position ``first`` on that a rank holds, counted from there."""
        return [
            (max(a, first) - first, b - first)
            for owner, a, b in self.runs
            if owner == rank and b > first
        ]


def _start(run: Run) -> int:
    return run.start


def _outside(run: Run, first: int, stop: int) -> list[Run]:
    owner, a, b = run
    parts = Run(owner, a, min(b, first)), Run(owner, max(a, stop), b)
    if first >= stop:
        return [run]
    return [part for part in parts if part.start < part.stop]


def joined(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The same with neighbours of one rank as one, and none that is empty.

    Args:
        runs: Ascending.
    """
    there = [run for run in runs if run.start < run.stop]
    if not there:
        return ()
    breaks = [
        i
        for i, (one, other) in enumerate(pairwise(there), 1)
        if one.owner != other.owner or one.stop != other.start
    ]
    bounds = pairwise([0, *breaks, len(there)])
    return tuple(Run(there[a].owner, there[a].start, there[b - 1].stop) for a, b in bounds)
