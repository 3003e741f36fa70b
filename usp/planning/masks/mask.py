"""Masks as values that compose: ``causal() & (window(512, 512) | first_keys(4))``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from usp.planning.kinds import integer
from usp.planning.masks import bands
from usp.planning.masks.bands import Bands


class Band(NamedTuple):
    """One band of some queries, ``ends + ahead``.

    Attributes:
        ends: (2, n) first and stop of each query.
        ahead: How much further they lie.
        rows: The queries that may see something; what stands for the others means nothing.
        every: Of queries that are any multiple of so far apart all ends are; 0 where they may not.
    """

    ends: Tensor
    ahead: int
    rows: range
    every: int = 0


# A list where all of them stand at once, else each until the next one is asked for.
EachBand = tuple[int, list[Band] | Iterator[Band]]


class Mask:
    """Which keys each query sees, by global positions.

    ``&`` is what both open, ``|`` what either opens, ``~`` what a mask hides. Masks are hashable
    and compare by value; printed, they are the calls that make them.
    """

    def bands(self, positions: Tensor, key_len: int, trim: bool = True) -> Bands:
        """The keys that each query sees, as disjoint ascending bands.

        Args:
            positions: (n,) int32 or int64 on CPU, ascending global positions of queries.
            key_len: Number of keys in the whole sequence.
            trim: Whether to leave out bands that none of these queries sees. Else there are as
                many, and each as monotone, whatever the positions: what queries between two of
                them see of a band lies between its first end at the one and its stop at the other.
        """
        raise NotImplementedError

    def each_band(self, positions: Tensor, key_len: int) -> EachBand:
        """The same one by one, some of them empty, and how many these are."""
        ends = torch.stack(self.bands(positions, key_len))
        return ends.shape[1], [Band(each, 0, range(len(positions))) for each in ends.unbind(1)]

    @property
    def seams(self) -> frozenset[tuple[int, int]]:
        """(start, width) of lines of queries: from line to line a band may jump over keys that
        nobody sees."""
        return frozenset()

    def refuse_lengths(self, query_len: int, key_len: int) -> None:
        """Refuse whole lengths that a mask does not fit.

        Raises:
            ValueError: names both lengths and those of the mask.
        """

    def dense(self, query_len: int, key_len: int) -> Tensor:
        """(query_len, key_len) bool on CPU, True where a query sees a key: to look at."""
        return visible_keys(self, torch.arange(query_len, device="cpu"), key_len)

    def __and__(self, other: Mask) -> Mask:
        return intersection_of((self, other)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return union_of((self, other)) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return self.mask if isinstance(self, Complement) else Complement(self)


def visible_keys(mask: Mask, positions: Tensor, key_len: int) -> Tensor:
    """(n, key_len) bool, True where the query at a global position sees the key.

    Args:
        mask: Who sees whom.
        positions: (n,) int64 on CPU, ascending.
        key_len: Number of keys in the whole sequence.
    """
    keys = torch.arange(key_len, device=positions.device)
    seen = torch.zeros((len(positions), key_len), dtype=torch.bool, device=positions.device)
    for first, stop in zip(*mask.bands(positions, key_len), strict=True):
        seen |= (keys >= first[:, None]) & (keys < stop[:, None])
    return seen


@dataclass(frozen=True)
class Everything(Mask):
    """Everyone sees everyone."""

    def bands(self, positions: Tensor, key_len: int, trim: bool = True) -> Bands:
        return bands.everything(positions, key_len)

    def __repr__(self) -> str:
        return "everything()"


@dataclass(frozen=True)
class Nothing(Mask):
    """Nobody sees anyone."""

    def bands(self, positions: Tensor, key_len: int, trim: bool = True) -> Bands:
        return bands.nothing(positions)

    def __repr__(self) -> str:
        return "nothing()"


@dataclass(frozen=True)
class Intersection(Mask):
    """What all of its masks open; made by ``&``."""

    masks: tuple[Mask, ...]

    def bands(self, positions: Tensor, key_len: int, trim: bool = True) -> Bands:
        parts = (mask.bands(positions, key_len, trim) for mask in self.masks)
        return reduce(lambda one, other: bands.intersection(one, other, trim), parts)

    @property
    def seams(self) -> frozenset[tuple[int, int]]:
        return frozenset().union(*(mask.seams for mask in self.masks))

    def refuse_lengths(self, query_len: int, key_len: int) -> None:
        for mask in self.masks:
            mask.refuse_lengths(query_len, key_len)

    def __repr__(self) -> str:
        return " & ".join(f"({m})" if isinstance(m, Union) else repr(m) for m in self.masks)


@dataclass(frozen=True)
class Union(Mask):
    """What any of its masks opens; made by ``|``."""

    masks: tuple[Mask, ...]

    def bands(self, positions: Tensor, key_len: int, trim: bool = True) -> Bands:
        return bands.union([mask.bands(positions, key_len, trim) for mask in self.masks], trim)

    @property
    def seams(self) -> frozenset[tuple[int, int]]:
        return frozenset().union(*(mask.seams for mask in self.masks))

    def refuse_lengths(self, query_len: int, key_len: int) -> None:
        for mask in self.masks:
            mask.refuse_lengths(query_len, key_len)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.masks))


@dataclass(frozen=True)
class Complement(Mask):
    """What a mask hides; made by ``~``."""

    mask: Mask

    def bands(self, positions: Tensor, key_len: int, trim: bool = True) -> Bands:
        return bands.complement(self.mask.bands(positions, key_len, trim), key_len, trim)

    @property
    def seams(self) -> frozenset[tuple[int, int]]:
        return self.mask.seams

    def refuse_lengths(self, query_len: int, key_len: int) -> None:
        self.mask.refuse_lengths(query_len, key_len)

    def __repr__(self) -> str:
        inner = repr(self.mask)
        return f"~({inner})" if isinstance(self.mask, Union | Intersection) else f"~{inner}"


@dataclass(frozen=True)
class Shifted(Mask):
    """A mask whose first query stands at a later position; made by ``shifted``."""

    mask: Mask
    query_offset: int

    def bands(self, positions: Tensor, key_len: int, trim: bool = True) -> Bands:
        return self.mask.bands(positions + self.query_offset, key_len, trim)

    def each_band(self, positions: Tensor, key_len: int) -> EachBand:
        return self.mask.each_band(positions + self.query_offset, key_len)

    @property
    def seams(self) -> frozenset[tuple[int, int]]:
        return frozenset((start - self.query_offset, width) for start, width in self.mask.seams)

    def refuse_lengths(self, query_len: int, key_len: int) -> None:
        self.mask.refuse_lengths(query_len + self.query_offset, key_len)

    def __repr__(self) -> str:
        return f"shifted({self.mask!r}, {self.query_offset})"


def intersection_of(masks: Iterable[Mask]) -> Mask:
    """What all of them open; the same value in whatever order they stand."""
    parts = _parts(masks, Intersection) - {Everything()}
    if Nothing() in parts:
        return Nothing()
    return _one_of(parts, Intersection) or Everything()


def union_of(masks: Iterable[Mask]) -> Mask:
    """What any of them opens; the same value in whatever order they stand."""
    parts = _parts(masks, Union) - {Nothing()}
    if Everything() in parts:
        return Everything()
    return _one_of(parts, Union) or Nothing()


def _parts(masks: Iterable[Mask], kind: type[Intersection] | type[Union]) -> set[Mask]:
    parts: set[Mask] = set()
    for mask in masks:
        parts |= set(mask.masks) if isinstance(mask, kind) else {mask}
    return parts


def _one_of(parts: set[Mask], kind: type[Intersection] | type[Union]) -> Mask | None:
    if len(parts) < 2:
        return next(iter(parts), None)
    return kind(tuple(sorted(parts, key=repr)))


def shifted(mask: Mask, query_offset: int) -> Mask:
    """The mask for queries that begin at a later position, as in decoding with a cache.

    Args:
        mask: By positions from 0.
        query_offset: Position of the first query among the keys; below 0 it stands before them.
    """
    offset = integer("query_offset", query_offset)
    if isinstance(mask, Shifted):
        return shifted(mask.mask, offset + mask.query_offset)
    return Shifted(mask, offset) if offset and not isinstance(mask, Everything | Nothing) else mask
