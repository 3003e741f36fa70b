"""Which keys of each rank another rank's queries see: the same table on every rank.

Ranks work out each other's needs from the mask alone. A band never moves back, so what the queries
between two positions see of it lies between its first end at the one and its stop at the other:
long rows are looked at in that many places, and what is counted can exceed what is seen only by
gaps inside such a stretch.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from usp.planning.layout import Layout, Positions, rows
from usp.planning.masks.mask import Mask
from usp.planning.rows import Rows, merged, rows_between

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
    seen = [_seen(mask, row, key_len) for row in rows(layouts[0], query_len, ring_degree)]
    first, stop = (torch.cat([runs[end] for runs in seen]) for end in (0, 1))
    counts = [len(runs[0]) for runs in seen]
    table: list[list[Rows]] = [[] for _ in seen]
    for owned in keys:
        ends = (_count_below(owned, end).split(counts) for end in (first, stop))
        for rank, (low, high) in enumerate(zip(*ends, strict=True)):
            table[rank].append(rows_between(len(owned), low, high))
    return tuple(map(tuple, table))


def _count_below(owned: Positions, positions: Tensor) -> Tensor:
    """``Positions.count_below`` for positions in any order."""
    if not len(positions) or not len(owned):
        return torch.zeros_like(positions)
    ordered, order = positions.sort()
    below = owned.count_below(ordered, owned.segment_of(ordered)).long()
    return torch.empty_like(positions).index_copy_(0, order, below)


def _seen(mask: Mask, row: Positions, key_len: int) -> tuple[Tensor, Tensor]:
    """Runs of global key positions that the queries of a row see, ascending, apart."""
    low, high = _stretches(row)
    for start, width in mask.seams:
        low, high = _cut(low, high, start, width)
    if not len(low):
        return low, high
    both = torch.stack((low, high), 1).flatten()
    bands = mask.bands(both, key_len, trim=False)
    first, stop = bands.first[:, 0::2].flatten(), bands.stop[:, 1::2].flatten()
    held = stop > first
    return merged(first[held], stop[held])


def _stretches(row: Positions) -> tuple[Tensor, Tensor]:
    """First and last position of stretches of the row, none longer than its runs."""
    length = max(1, -(-len(row) // _STRETCHES))
    counts, start = row.counts.flatten(), row.start.flatten()
    pieces = (counts + (length - 1)) // length
    run = torch.arange(len(counts), device=start.device).repeat_interleave(pieces)
    piece = torch.arange(len(run), device=start.device) - (pieces.cumsum(0) - pieces)[run]
    low = piece * length
    high = torch.minimum(low + length, counts[run]) - 1
    return start[run] + row.stride * low, start[run] + row.stride * high


def _cut(low: Tensor, high: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Stretches that cross no seam; these lie at ``start`` and every ``width`` positions."""
    line = torch.div(low - start, width, rounding_mode="floor")
    pieces = torch.div(high - start, width, rounding_mode="floor") - line + 1
    which = torch.arange(len(low), device=low.device).repeat_interleave(pieces)
    piece = torch.arange(len(which), device=low.device) - (pieces.cumsum(0) - pieces)[which]
    begin = start + (line[which] + piece) * width
    return torch.maximum(low[which], begin), torch.minimum(high[which], begin + (width - 1))
