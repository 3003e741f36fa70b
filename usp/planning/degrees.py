"""A degree for every document: how many ranks share it, and which, so that all are done soon.

A long document needs many ranks; a short one, cut over many, is mostly messages. Ranks form groups
inside groups, the whole mesh, its halves, and so on to single ranks. A document is given to one of
these groups. All groups work off their documents from the largest degree down, so a rank waits for
no one but the ranks that it computes with. Where ranks share cores, what one does not compute is
time for the others.

Sources: FlexSP (arXiv:2412.01523) and ByteScale (arXiv:2502.21231), which choose degrees for the
sequences of a batch by a cost model; the search here is our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import NamedTuple

from usp.planning.document_cost import DocumentCost

_THRESHOLDS = 48  # tried for when a document is cut
_NEAR = 1.001  # of the least that any schedule takes: no other is tried
_MOVED = 4  # documents that are tried elsewhere in a round
_ROUNDS = 64  # of moving single documents of the rank that is done last


class Shared(NamedTuple):
    """Ranks that compute on the same cores, of which so many compute at once."""

    ranks: tuple[int, ...]
    at_once: float


class Placed(NamedTuple):
    """Where a document is: on the ranks ``[group * degree, (group + 1) * degree)``."""

    degree: int
    group: int


@dataclass(frozen=True)
class Degrees:
    """Where all documents are.

    Attributes:
        placed: Of each document.
        loads: Seconds of each rank by the cost model, on cores of its own, and its tokens, rounded
            up.
        shared: Ranks that have no cores of their own.
    """

    placed: tuple[Placed, ...]
    loads: tuple[tuple[float, int], ...]
    shared: tuple[Shared, ...] = ()

    @property
    def makespan(self) -> float:
        """Seconds: of the busiest rank, or of the cores that have most to do, whatever is more."""
        busiest = max(seconds for seconds, _ in self.loads)
        return max(busiest, *(self.seconds_of(each) for each in self.shared), 0.0)

    def seconds_of(self, shared: Shared) -> float:
        """Of cores that ranks share, where none of these waits."""
        return sum(self.loads[rank][0] for rank in shared.ranks) / shared.at_once


def nested_degrees(ring: int, ulysses: int) -> list[tuple[int, int]]:
    """(ring, ulysses) of the mesh and of ever smaller ones inside, to one rank."""
    found = [(ring, ulysses)]
    while ring * ulysses > 1:
        if ring > 1:
            ring //= _smallest_prime(ring)
        else:
            ulysses //= _smallest_prime(ulysses)
        found.append((ring, ulysses))
    return found


def _smallest_prime(number: int) -> int:
    return next(p for p in range(2, number + 1) if number % p == 0)


def choose_degrees(
    lengths: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    cost: DocumentCost,
    most_tokens: int | None = None,
    shared: Sequence[Shared] = (),
) -> Degrees:
    """A degree and a place for each document, for a short makespan.

    A threshold of seconds gives each document the least degree at which it stays below; documents
    then go one by one, longest first, to the group that is done first. The best of many thresholds
    is improved by single moves. Deterministic: ranks that know the lengths agree.

    Args:
        lengths: Tokens of each document.
        sizes: (ring, ulysses) of the nested groups, from all ranks to 1: ``nested_degrees``.
        cost: Of one layer.
        most_tokens: That a rank has room for.
        shared: Ranks that compute on the same cores; others have their own.

    Raises:
        ValueError: the tokens have no room; says both numbers.
    """
    groups = {ring * ulysses: (ring, ulysses) for ring, ulysses in sizes}
    ranks, total = max(groups), sum(lengths)
    if most_tokens is not None and total > ranks * most_tokens:
        raise ValueError(
            f"{total} tokens do not fit {ranks} ranks of {most_tokens} tokens (most_tokens): take "
            "fewer documents at once, or more ranks"
        )
    batch = _Batch.of(lengths, groups, cost, most_tokens, tuple(shared))
    best: Degrees | None = None
    for degrees in batch.choices():
        found = _place(batch, degrees)
        if found is not None and (best is None or found.makespan < best.makespan):
            best = found
            if best.makespan <= _NEAR * batch.least:
                return best
    if best is None:
        raise ValueError(
            f"{len(lengths)} documents of {total} tokens, the longest of {max(lengths)}, do not "
            f"fit {ranks} ranks of {most_tokens} tokens (most_tokens) whole: leave more room"
        )
    return _improved(best, batch)


class _Batch(NamedTuple):
    """What there is to place.

    Attributes:
        lengths: Tokens of each document.
        longest: Their numbers, the longest first.
        seconds: Of each rank, for a document of a length, by the degrees of groups.
        fixed: Of each rank in a group of a degree that has documents.
        ranks: All of them.
        most_tokens: That a rank has room for.
        shared: Who shares cores.
    """

    lengths: Sequence[int]
    longest: Sequence[int]
    seconds: Mapping[int, Mapping[int, float]]
    fixed: Mapping[int, float]
    ranks: int
    most_tokens: int | None
    shared: tuple[Shared, ...]

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        groups: Mapping[int, tuple[int, int]],
        cost: DocumentCost,
        most_tokens: int | None,
        shared: tuple[Shared, ...],
    ) -> _Batch:
        longest = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
        rising = sorted(groups)
        seconds = {n: {d: cost.of_document(n, *groups[d]) for d in rising} for n in set(lengths)}
        fixed = {degree: cost.of_group(*size) for degree, size in groups.items()}
        return cls(lengths, longest, seconds, fixed, rising[-1], most_tokens, shared)

    @property
    def least(self) -> float:
        """Seconds below which no makespan is: all whole, on ranks or cores that are even."""
        at_once = self.ranks - sum(len(ranks) - at_once for ranks, at_once in self.shared)
        return sum(self.seconds[n][1] for n in self.lengths) / at_once

    def choices(self) -> Iterator[tuple[int, ...]]:
        """Degrees of all documents, for falling thresholds; many of these choose alike."""
        high = max((s for each in self.seconds.values() for s in each.values()), default=0.0)
        tried = {high * (1 / 1024) ** (i / _THRESHOLDS) for i in range(_THRESHOLDS + 1)} | {0.0}
        seen = set()
        for threshold in sorted(tried, reverse=True):
            chosen = {
                n: next((degree for degree, s in each.items() if s <= threshold), self.ranks)
                for n, each in self.seconds.items()
            }
            degrees = tuple(chosen[n] for n in self.lengths)
            if degrees not in seen:
                seen.add(degrees)
                yield degrees


def _place(batch: _Batch, chosen: Sequence[int]) -> Degrees | None:
    """Documents of these degrees in groups, the largest groups first; None without room."""
    lengths, most = batch.lengths, batch.most_tokens
    loads = [(0.0, 0)] * batch.ranks
    placed = [Placed(1, 0)] * len(lengths)
    for degree in sorted(batch.fixed, reverse=True):
        own = [i for i in batch.longest if chosen[i] == degree]
        if not own:
            continue
        # inside a group all ranks are equal yet: only larger degrees have been placed
        groups = [(*loads[g * degree], g) for g in range(batch.ranks // degree)]
        heapify(groups)
        started = set()
        for i in own:
            seconds, tokens, group = heappop(groups)
            if group not in started:
                started.add(group)
                seconds += batch.fixed[degree]
            seconds += batch.seconds[lengths[i]][degree]
            tokens += -(-lengths[i] // degree)
            if most is not None and tokens > most:
                return None
            heappush(groups, (seconds, tokens, group))
            placed[i] = Placed(degree, group)
        for seconds, tokens, group in groups:
            loads[group * degree : (group + 1) * degree] = [(seconds, tokens)] * degree
    return Degrees(tuple(placed), tuple(loads), batch.shared)


def _improved(best: Degrees, batch: _Batch) -> Degrees:
    """Documents of those who are done last to the next degrees, as long as that helps."""
    degrees = sorted(batch.fixed, reverse=True)
    for _ in range(_ROUNDS):
        found = best
        for i in _last_done(best, batch):
            at = degrees.index(best.placed[i].degree)
            for degree in degrees[max(0, at - 1) : at + 2]:
                chosen = [placed.degree for placed in best.placed]
                if chosen[i] == degree:
                    continue
                chosen[i] = degree
                moved = _place(batch, chosen)
                if moved is not None and moved.makespan < found.makespan:
                    found = moved
        if found is best:
            return best
        best = found
    return best


def _last_done(found: Degrees, batch: _Batch) -> list[int]:
    """The longest documents of the rank that is done last; of cores that are, those that are cut,
    for these have less to do where fewer ranks share a document."""
    seconds = [load for load, _ in found.loads]
    last: tuple[int, ...] = (seconds.index(max(seconds)),)
    least = 1
    for shared in found.shared:
        if found.seconds_of(shared) == found.makespan > max(seconds):
            last, least = shared.ranks, 2
    groups = {(degree, rank // degree) for degree in batch.fixed for rank in last}
    theirs = (i for i in batch.longest if found.placed[i] in groups)
    return list(islice((i for i in theirs if found.placed[i].degree >= least), _MOVED))
