"""Which keys of each rank another rank's queries see: the same table on every rank.

Ranks work out each other's needs from the mask alone. A band never moves back, so what the queries
between two positions see of it lies between its first end at the one and its stop at the other:
long rows are looked at in that many places, and what is counted can exceed what is seen only by
gaps inside such a stretch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from usp.planning.layout import Layout, rows
from usp.planning.masks.mask import Mask
from usp.planning.positions import Positions
from usp.planning.rows import Rows, all_rows, merged, no_rows
from usp.planning.seen import Here
from usp.planning.walk import each_of, run_of_each

# Stretches into which a rank's queries are cut; up to so many queries every one is looked at.
_STRETCHES = 1024


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
    seen = _seen(mask, rows(layouts[0], query_len, ring_degree), key_len)
    ends = torch.cat([torch.stack(runs) for runs in seen], 1)
    rank_of = run_of_each(torch.tensor([len(runs[0]) for runs in seen], device="cpu"))
    table = []
    for owned, (low, high) in zip(keys, _counted(keys, ends, key_len), strict=True):
        held = high > low
        apart = (end[held].long() for end in (low, high))
        nothing = [no_rows(len(owned))] * len(seen)
        table.append(_rows_of(nothing, rank_of[held], *apart))
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
    ends = torch.cat([torch.stack((each.first, each.stop)) for each in seen], 2)
    # places of the stretches among the queries of their row
    places = [
        row.count_below(torch.stack((each.low, each.high))) + torch.tensor([[0], [1]], device="cpu")
        for row, each in zip(queries, seen, strict=True)
    ]
    start, stop = torch.cat(places, 1)
    owner_of = run_of_each(torch.tensor([len(each.low) for each in seen], device="cpu"))
    nothing, table = [no_rows(len(row)) for row in queries], []
    for low, high in _counted(keys, ends.flatten(1), key_len):
        held = (high > low).view_as(ends[0]).any(0)
        table.append(tuple(_rows_of(nothing, owner_of[held], start[held], stop[held])))
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
    runs = zip(nothing, start.split(counts), stop.split(counts), strict=True)
    return [Rows(none.total, *ends) if len(ends[0]) else none for none, *ends in runs]


def _counted(keys: Sequence[Positions], ends: Tensor, key_len: int) -> Iterator[Tensor]:
    """Of each owner, how many of all its keys lie below each of (2, n) int64."""
    room = None
    for owned in keys:
        here = Here(owned, all_rows(len(owned)), key_len, ends.numel())
        here.expect(1)
        if here.has_table:
            room = here.make_table(room)
        yield here.count_below(ends)


def _seen(mask: Mask, table: tuple[Positions, ...], key_len: int) -> list[tuple[Tensor, Tensor]]:
    """Of each row, the runs of global key positions that its queries see, ascending, apart."""
    return [_seen_runs(each.first, each.stop) for each in _by_stretches(mask, table, key_len)]


class _Stretches(NamedTuple):
    """Of a row: stretches of its queries, and what they see.

    Attributes:
        low, high: (stretches,) first and last position.
        first, stop: (bands, stretches) of each band what they see of it.
    """

    low: Tensor
    high: Tensor
    first: Tensor
    stop: Tensor


@lru_cache(maxsize=1)  # what is needed of keys and of queries is asked one after the other
def _by_stretches(mask: Mask, table: tuple[Positions, ...], key_len: int) -> list[_Stretches]:
    stretches = [_stretches(row) for row in table]
    for start, width in mask.seams:
        stretches = [_cut(*ends, start, width) for ends in stretches]
    counts = [len(low) for low, _ in stretches]
    # the mask is asked once for all rows: many small questions take longer
    ends, order = torch.cat([torch.cat(ends) for ends in zip(*stretches, strict=True)]).sort()
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device="cpu"))
    bands = mask.bands(ends, key_len, trim=False)
    low, high = place.tensor_split(2)
    each = zip(stretches, low.split(counts), high.split(counts), strict=True)
    return [
        _Stretches(*ends, each_of(bands.first, low), each_of(bands.stop, high))
        for ends, low, high in each
    ]


def _seen_runs(first: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of keys that are seen of bands, ascending, with something between them.

    Args:
        first, stop: (bands, stretches) of each band what the stretches of queries see of it.
    """
    if first.shape[1] > 1:
        # along a band they ascend, and mostly touch: few are left to sort
        apart, edge = first[:, 1:] > stop[:, :-1], torch.ones_like(first[:, :1], dtype=torch.bool)
        first = first[torch.cat((edge, apart), 1)]
        stop = stop[torch.cat((apart, edge), 1)]
    held = stop > first
    return merged(first[held], stop[held])


def _stretches(row: Positions) -> tuple[Tensor, Tensor]:
    """First and last position of stretches of the row, none longer than its runs."""
    length = max(1, -(-len(row) // _STRETCHES))
    counts, start = row.counts.flatten(), row.start.flatten()
    pieces = (counts + (length - 1)) // length
    run = run_of_each(pieces)
    piece = torch.arange(len(run), device=start.device) - (pieces.cumsum(0) - pieces)[run]
    low = piece * length
    high = torch.minimum(low + length, counts[run]) - 1
    return start[run] + row.stride * low, start[run] + row.stride * high


def _cut(low: Tensor, high: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Stretches that cross no seam; these lie at ``start`` and every ``width`` positions."""
    line = torch.div(low - start, width, rounding_mode="floor")
    pieces = torch.div(high - start, width, rounding_mode="floor") - line + 1
    which = run_of_each(pieces)
    piece = torch.arange(len(which), device=low.device) - (pieces.cumsum(0) - pieces)[which]
    begin = start + (line[which] + piece) * width
    return torch.maximum(low[which], begin), torch.minimum(high[which], begin + (width - 1))
