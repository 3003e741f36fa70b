"""The tokens in front of each rank's own, which others hold: pure data."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple


class Piece(NamedTuple):
    """Rows that two ranks exchange.

    Attributes:
        rank: The other one.
        start, stop: Rows of this rank's own tokens, or of its halo.
    """

    rank: int
    start: int
    stop: int


@dataclass(frozen=True)
class Halo:
    """Of one rank, ``left`` rows in front of its own; nobody sends those of another document.

    Attributes:
        left: How many there are.
        send: Its own rows in those of others.
        receive: Rows of its own halo.
    """

    left: int
    send: tuple[Piece, ...]
    receive: tuple[Piece, ...]


def halo_of(first: tuple[int, ...], documents: tuple[int, ...], left: int, rank: int) -> Halo:
    """Who sends which rows: each once to each rank that needs it.

    Args:
        first: Of each rank the position of its first token, and behind them the length.
        documents: Boundaries ``(0, ..., length)``.
        left: How many tokens in front of its own each rank sees.
        rank: This one.
    """
    wanted = [_wanted(first, documents, left, reader) for reader in range(len(first) - 1)]

    def shared(owner: int, reader: int) -> tuple[int, int]:
        (start, stop), own = wanted[reader], first[owner : owner + 2]
        return max(start, own[0]), min(stop, own[1])

    def pieces(others: range, is_owner: bool, origin: int) -> tuple[Piece, ...]:
        found = []
        for other in others:
            start, stop = shared(rank, other) if is_owner else shared(other, rank)
            if start < stop:
                found.append(Piece(other, start - origin, stop - origin))
        return tuple(found)

    mine = first[rank]
    return Halo(
        left,
        pieces(range(rank + 1, len(wanted)), True, mine),
        pieces(range(rank), False, mine - left),
    )


def _wanted(
    first: tuple[int, ...], documents: tuple[int, ...], left: int, rank: int
) -> tuple[int, int]:
    """Positions of a rank's halo, from and up to; none for one without tokens."""
    start, stop = first[rank : rank + 2]
    if start == stop:
        return start, start
    return max(start - left, documents[bisect_right(documents, start) - 1]), start
