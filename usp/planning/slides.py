"""Bands of one shape, each ahead of the last, among keys that lie at equal distances.

Queries then see all bands at the places of one of them, further on by so many keys; and from owner
to owner, or from one owner's queries to another's, these places are mostly the same to the key:
such owners share the tables of their ends, which take more time to write than to work out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from usp.planning.masks.bands import Bands, joined
from usp.planning.masks.mask import Band
from usp.planning.memory import uninitialised
from usp.planning.positions import Positions
from usp.planning.visit import Span, Visit
from usp.planning.walk import divided


class Slides:
    """The tables of the ends of one mask's bands, among keys of so many in all."""

    def __init__(self, key_len: int) -> None:
        self._key_len = key_len
        self._known: list[tuple[Tensor, object, Tensor]] = []

    def visit(self, bands: Sequence[Band], keys: Positions) -> Visit | None:
        """What queries see of an owner's keys; None where this is no way to find it."""
        stride, count = keys.stride, len(keys)
        if len(bands) < 2 or len(keys.start) != 1 or not 0 <= int(keys.start) < stride:
            return None
        if int(keys.stop) != self._key_len or any(band.ahead % stride for band in bands):
            return None
        if any(band.ends is not bands[0].ends for band in bands):
            return None
        # no end lies outside of all keys, so no place outside of these: nothing is to be clamped
        places = divided(bands[0].ends - (int(keys.start) - stride + 1), stride)
        if any(torch.equal(*places[:, band.rows.start : band.rows.stop]) for band in bands):
            return None
        shape = count, [(band.ahead // stride, band.rows) for band in bands]
        first, stop = joined(Bands(*(self._table(each, *shape) for each in places)))
        span = Span(first, stop) if len(first) > 1 else Span(first[0], stop[0])
        return Visit(places.shape[1], count, span)

    def _table(self, places: Tensor, count: int, bands: list[tuple[int, range]]) -> Tensor:
        """(bands, n) the places of an end, further on in each band.

        Args:
            places: (n,) int32, among so many keys.
            bands: How far ahead in keys, and which queries see something.
        """
        for known, shape, table in self._known:
            if shape == (count, bands) and torch.equal(known, places):
                return table
        table = uninitialised(len(bands), len(places), dtype=places.dtype)
        for (ahead, rows), out in zip(bands, table, strict=True):
            some = slice(rows.start, rows.stop)
            out[: rows.start], out[rows.stop :] = 0, count
            torch.add(places[some], ahead, out=out[some])
        self._known.append((places, (count, bands), table))
        return table
