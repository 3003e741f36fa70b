"""Which keys of each rank another rank's queries see: the same table on every rank.

Ranks work out each other's needs from the mask alone. A band never moves back, so what the queries
between two positions see of it lies between its first end at the one and its stop at the other:
long rows are looked at in that many places, and what is counted can exceed what is seen only by
gaps inside such a stretch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from usp.planning.layout import Layout, rows
from usp.planning.masks.mask import Mask
from usp.planning.memory import uninitialised
from usp.planning.owners import counted_below, seeing
from usp.planning.positions import Positions
from usp.planning.rows import Rows, merged, no_rows
from usp.planning.walk import divided, each_of, pieces_of_each, run_of_each

# Stretches into which a rank's queries are cut; up to so many queries every one is looked at.
_STRETCHES = 1024
# Ends of theirs that are looked at together.
_WORTH = 1 << 17


@lru_cache(maxsize=32)
def needed_rows(
    mask: Mask, layouts: tuple[Layout, Layout], lengths: tuple[int, int], ring_degree: int
) -> tuple[tuple[Rows, ...], ...]:
    """Of each rank, by each owner, the rows of that owner's keys which the rank's queries see.

    Args:
        mask: Who sees whom.
        layouts: Which query is where, and which key.
        lengths: Queries and keys of the whole sequences.
        ring_degree: Ranks of the ring.
    """
    query_len, key_len = lengths
    keys = rows(layouts[1], key_len, ring_degree)
    seen = _by_stretches(mask, rows(layouts[0], query_len, ring_degree), key_len)
    # a few rows at a time, in the cache
    parts = [_seen_runs(seen.row_of[a:b], seen.ends[..., a:b], key_len) for a, b in _cuts(seen)]
    rank_of, *runs = map(torch.cat, zip(*parts, strict=True))
    table, nothing = [], [[no_rows(len(owned))] * ring_degree for owned in keys]
    for none, counted in zip(
        nothing, counted_below(keys, torch.stack(runs).int(), key_len), strict=True
    ):
        held = (counted[1] > counted[0]).nonzero().flatten()
        low, high = (end.index_select(0, held).long() for end in counted)
        table.append(_rows_of(none, rank_of.index_select(0, held), low, high))
    return tuple(zip(*table, strict=True))


@lru_cache(maxsize=32)
def needed_queries(
    mask: Mask, layouts: tuple[Layout, Layout], lengths: tuple[int, int], ring_degree: int
) -> tuple[tuple[Rows, ...], ...]:
    """Of each rank, by each owner of queries, the rows of these that see keys of the rank.

    Arguments as in ``needed_rows``; stretches are counted whole.
    """
    query_len, key_len = lengths
    queries = rows(layouts[0], query_len, ring_degree)
    keys = rows(layouts[1], key_len, ring_degree)
    seen = _by_stretches(mask, queries, key_len)
    nothing, table = [no_rows(len(row)) for row in queries], []
    if not seen.ends.numel():
        return (tuple(nothing),) * ring_degree
    for held in seeing(keys, seen.ends, key_len):
        runs = (each.index_select(0, held) for each in (seen.row_of, seen.start, seen.stop))
        table.append(tuple(_rows_of(nothing, *runs)))
    return tuple(table)


def _rows_of(nothing: Sequence[Rows], block: Tensor, start: Tensor, stop: Tensor) -> list[Rows]:
    """Rows of several blocks.

    Args:
        nothing: No rows of each block: what most ranks of a long ring see of most owners.
        block: Of each run, which block it is of, ascending.
        start, stop: Of each run, ascending in a block; those that touch become one.
    """
    apart = ((start[1:] > stop[:-1]) | (block[1:] != block[:-1])).nonzero().flatten()
    if len(apart) < len(start) - 1:
        start = torch.cat((start[:1], start[1:].index_select(0, apart)))
        stop = torch.cat((stop.index_select(0, apart), stop[-1:]))
        block = torch.cat((block[:1], block[1:].index_select(0, apart)))
    counts = torch.bincount(block, minlength=len(nothing)).tolist()
    found, held = [*nothing], [i for i, count in enumerate(counts) if count]
    each = (ends.split([counts[i] for i in held]) for ends in (start, stop))
    for i, *ends in zip(held, *each, strict=True):
        found[i] = Rows(nothing[i].total, *ends)
    return found


class _Stretches(NamedTuple):
    """Stretches of the queries of all rows, and what they see.

    Attributes:
        row_of: (stretches,) ascending.
        start, stop: (stretches,) which queries of their row they are.
        ends: (2, bands, stretches) int32, of each band between which positions they see.
    """

    row_of: Tensor
    start: Tensor
    stop: Tensor
    ends: Tensor


@lru_cache(maxsize=1)  # what is needed of keys and of queries is asked one after the other
def _by_stretches(mask: Mask, table: tuple[Positions, ...], key_len: int) -> _Stretches:
    row_of, start, stop, low, high = _stretches(table, mask.seams)
    # the mask is asked once for all rows: many small questions take longer
    ends, order = torch.cat((low, high)).sort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device="cpu"))
    bands = mask.bands(ends.int(), key_len, trim=False)
    seen = uninitialised(2, len(bands.first), len(low), dtype=torch.int32)
    for end, at, out in zip(bands, place.tensor_split(2), seen, strict=True):
        each_of(end, at, out)
    return _Stretches(row_of, start, stop, seen)


def _cuts(seen: _Stretches) -> list[tuple[int, int]]:
    """Stretches of some whole rows at a time: so many that each part is worth its calls."""
    ends, cuts = torch.bincount(seen.row_of).cumsum(0).tolist(), [0]
    for end in ends:
        if (end - cuts[-1]) * seen.ends.shape[1] >= _WORTH or end == ends[-1]:
            cuts.append(end)
    return [*pairwise(cuts)] or [(0, 0)]


def _seen_runs(row: Tensor, ends: Tensor, key_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of keys that rows see: of each its row, and both ends; ascending in a row, with
    something between them.

    Args:
        row: (stretches,) ascending.
        ends: (2, bands, stretches) int32, between which positions they see.
    """
    # of each row behind those of the row before, in half the memory where that can be
    small = not len(row) or (int(row[-1]) + 1) * (key_len + 1) < 2**31
    dtype = torch.int32 if small else torch.int64
    start, stop = ends + (row * (key_len + 1)).to(dtype)
    apart = start[:, 1:] > stop[:, :-1]
    if 2 * int(apart.sum()) < apart.numel():
        # along a band they mostly touch: few are left to sort
        begins, stops = (F.pad(apart, pad, value=True) for pad in ((1, 0), (0, 1)))
        start, stop = start[begins], stop[stops]
    start, stop = start.flatten(), stop.flatten()
    held = (stop > start).nonzero().flatten()
    start, stop = merged(start.index_select(0, held), stop.index_select(0, held))
    row = start.long() // (key_len + 1)
    behind = row * (key_len + 1)
    return row, start - behind, stop - behind


def _stretches(
    table: tuple[Positions, ...], seams: Iterable[tuple[int, int]]
) -> tuple[Tensor, ...]:
    """Stretches of the queries of all rows, none longer than the runs of its row.

    Args:
        table: Rows of a layout.
        seams: Of a mask: what crosses one is cut.

    Returns:
        Of each its row; which queries of the row it is, from and up to; and the first position
        and the last.
    """
    stride, each = table[0].stride, [len(row.start) for row in table]
    start, counts = (torch.cat([getattr(r, name) for r in table]) for name in ("start", "counts"))
    row_of = run_of_each(torch.tensor(each, device="cpu"))
    before = torch.cat([row.counts.cumsum(0) - row.counts for row in table])
    lengths = torch.tensor([max(1, -(-len(row) // _STRETCHES)) for row in table], device="cpu")
    length = lengths[row_of]
    run, piece = pieces_of_each((counts + (length - 1)) // length)
    length = length[run]
    low = start[run] + stride * (piece * length)
    high = start[run] + stride * (torch.minimum(piece * length + length, counts[run]) - 1)
    for seam, width in seams:
        if torch.equal(divided(low - seam, width), divided(high - seam, width)):
            continue
        which, low, high = _cut(low, high, seam, width)
        run = run[which]
    start, before = start[run] - (stride - 1), before[run]
    places = (divided(end - start, stride).add_(before) for end in (low, high))
    first, last = places
    return row_of[run], first, last + 1, low, high


def _cut(low: Tensor, high: Tensor, start: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stretches that cross no seam, and of which ones they are pieces; seams lie at ``start`` and
    every ``width`` positions."""
    line = divided(low - start, width)
    pieces = divided(high - start, width) - line + 1
    which, piece = pieces_of_each(pieces)
    begin = start + (line[which] + piece) * width
    low, high = torch.maximum(low[which], begin), torch.minimum(high[which], begin + (width - 1))
    return which, low, high
