"""Bands: for each query position a few intervals of keys, and what can be done with them.

A band gives each query one interval ``[first, stop)``, both ends non-decreasing along the queries.
Sets of bands here are disjoint and ascending: ``stop[i] <= first[i + 1]`` for each query, so that
every key counts once. They are closed under union, intersection and complement: the i-th largest
of monotone functions is monotone, and so are the larger and the smaller of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from usp.planning.memory import uninitialised

_FEW = 256  # queries


class Bands(NamedTuple):
    """Disjoint bands in ascending order.

    Attributes:
        first, stop: (bands, n) int32 or int64 on CPU, ``0 <= first <= stop``, non-decreasing
            along n; equal where a query sees nothing of a band.
    """

    first: Tensor
    stop: Tensor

    @property
    def pairs(self) -> int:
        """Number of visible (query, key) pairs."""
        return int((self.stop - self.first).sum())


def everything(positions: Tensor, key_len: int) -> Bands:
    """One band of all keys."""
    return clipped(torch.zeros_like(positions), torch.full_like(positions, key_len), key_len)


def nothing(positions: Tensor) -> Bands:
    """No band."""
    empty = positions.new_empty((0, len(positions)))
    return Bands(empty, empty)


def clipped(first: Tensor, stop: Tensor, key_len: int) -> Bands:
    """The band or the disjoint bands between ends that may lie outside the keys, or cross.

    Args:
        first, stop: (n,) or (bands, n) integers, non-decreasing along n; they are written to.
        key_len: Number of keys.
    """
    first, stop = torch.atleast_2d(first), torch.atleast_2d(stop)
    first, stop = first.clamp_(0, key_len), stop.clamp_(0, key_len)
    # The larger of two non-decreasing ends is non-decreasing: an empty band stays monotone.
    return Bands(first, torch.maximum(first, stop, out=stop))


def without_empty(bands: Bands, trim: bool = True) -> Bands:
    """Those that some query sees something of; not ``trim``: all of them, see ``Mask.bands``."""
    if not trim:
        return bands
    used = [not alike(*ends) for ends in zip(*bands, strict=True)]
    return bands if all(used) else Bands(bands.first[used], bands.stop[used])


def union(parts: Sequence[Bands], trim: bool = True) -> Bands:
    """What is in any of them.

    How many intervals hold a key is told by their ends alone, in whatever order: so the i-th first
    and the i-th stop make as good intervals, and each is cut off where the one before it ends.
    """
    ends = [ends for bands in parts for ends in zip(*bands, strict=True)]
    if trim:
        ends = [each for each in ends if not alike(*each)]
    if not ends:
        return Bands(*(end[:0] for end in parts[0]))
    first, stop = zip(*ends, strict=True)
    return disjoint(first, stop, trim)


def disjoint(
    first: Sequence[Tensor] | Tensor, stop: Sequence[Tensor] | Tensor, trim: bool = True
) -> Bands:
    """Bands that may overlap, (n,) each, as disjoint ones."""
    firsts, stops = _sorted([*first]), _sorted([*stop])
    # fresh memory takes longer than what is written there
    found = Bands(*uninitialised(2, len(firsts), len(firsts[0]), dtype=firsts[0].dtype))
    torch.stack(stops, out=found.stop)
    found.first[0].copy_(firsts[0])
    for ends in zip(stops[:-1], firsts[1:], found.first[1:], strict=True):
        torch.maximum(*ends[:2], out=ends[2])
    return joined(without_empty(found)) if trim else found


def joined(bands: Bands) -> Bands:
    """Neighbours that leave no key between them, for any query, as one."""
    if len(bands.first) < 2:
        return bands
    neighbours = zip(bands.stop[:-1], bands.first[1:], strict=True)
    apart = [not alike(*ends) for ends in neighbours]
    if all(apart):
        return bands
    return Bands(bands.first[[True, *apart]], bands.stop[[*apart, True]])


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two ends are the same for all queries: mostly the last or those in the middle show
    that they are not, where a search among flags would go through all."""
    for start in (max(0, len(one) - _FEW), len(one) // 2):
        if not torch.equal(one[start : start + _FEW], other[start : start + _FEW]):
            return False
    return torch.equal(one, other)


def _sorted(rows: list[Tensor]) -> list[Tensor]:
    """Along the bands; for a few of them comparing rows is many times faster than a sort."""
    if len(rows) > 8:
        return [*torch.stack(rows).sort(0).values]
    for last in range(len(rows) - 1, 0, -1):
        for i in range(last):
            rows[i], rows[i + 1] = (
                torch.minimum(rows[i], rows[i + 1]),
                torch.maximum(rows[i], rows[i + 1]),
            )
    return rows


def intersection(one: Bands, other: Bands, trim: bool = True) -> Bands:
    """What is in both."""
    first = torch.maximum(one.first[:, None], other.first[None]).flatten(0, 1)
    stop = torch.minimum(one.stop[:, None], other.stop[None]).flatten(0, 1)
    found = without_empty(Bands(first, torch.maximum(first, stop, out=stop)), trim)
    if len(found.first) < 2 or not found.first.numel() or _are_apart(found):
        return joined(found) if trim else found
    return disjoint(*found, trim)


def _are_apart(bands: Bands) -> bool:
    """Whether each band ends before the next one begins, for all queries, one at least."""
    return int((bands.stop[:-1] - bands.first[1:]).amax()) <= 0


def complement(bands: Bands, key_len: int, trim: bool = True) -> Bands:
    """What is in none of them: before, between and behind them."""
    zeros = bands.first.new_zeros((1, bands.first.shape[1]))
    first = torch.cat((zeros, bands.stop))
    stop = torch.cat((bands.first, zeros + key_len))
    return without_empty(Bands(first, stop), trim)
