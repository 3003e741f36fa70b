"""Which side moves along the ring, keys, queries or both, in a forward and in its backward.

Few queries over many keys (latents, pooling by attention, decoding) move both times: each rank
computes the queries of all that see its keys, and what was found is merged at home. In a backward
they may travel alone (``planning/query_ring.py``). On two levels both may move, on a grid
(``planning/grid.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from usp.planning.double_ring import rows_on_two_levels
from usp.planning.grid import rows_on_grid
from usp.planning.layout import Layout, rows
from usp.planning.problem import state_dtype
from usp.planning.reach import needed_queries, needed_rows
from usp.planning.route import rows_moved
from usp.planning.samples import Masks

Layouts = tuple[Layout, Layout]


@dataclass(frozen=True)
class Width:
    """Bytes of one row of the heads that a ring holds: what goes, and what comes back of it."""

    there: int
    back: int

    @property
    def both(self) -> int:
        return self.there + self.back


@dataclass(frozen=True)
class Sizes:
    """What moves along a ring.

    Attributes:
        batch: Samples.
        num_heads: Query heads that the ring holds.
        key_width: Numbers of a token's keys and values there.
        head_dim, value_head_dim: D and Dv.
        dtype: Of q, k and v.
    """

    batch: int
    num_heads: int
    key_width: int
    head_dim: int
    value_head_dim: int
    dtype: torch.dtype

    def of_queries(self, backward: bool) -> Width:
        """q there and (out, lse) back; or q, dout, lse, delta there and dq back."""
        size, wide = self.dtype.itemsize, state_dtype(self.dtype).itemsize
        dim, value_dim = self.head_dim, self.value_head_dim
        there = size * (dim + value_dim) + 2 * wide if backward else size * dim
        back = wide * (dim if backward else value_dim + 1)
        return Width(self.num_heads * there, self.num_heads * back)

    def of_keys(self, backward: bool) -> Width:
        """K and V there, and in a backward dK and dV back."""
        width = self.key_width
        back = width * state_dtype(self.dtype).itemsize if backward else 0
        return Width(width * self.dtype.itemsize, back)


class Moves(NamedTuple):
    """What moves: "keys", "queries", or "both", on a grid."""

    forward: str
    backward: str


_OF_TRANSPORTS = {
    "queries": Moves("queries", "queries"),
    "query_ring": Moves("keys", "queries"),
    "grid": Moves("both", "both"),
}
_KEYS = Moves("keys", "keys")


def which_move(
    transport: str,
    what: tuple[Masks, Layouts, tuple[int, int], int],
    sizes: Sizes,
    has_bias: bool,
    outer_degree: int = 1,
) -> Moves:
    """What moves, worked out alike on every rank of a ring.

    Args:
        transport: Of TRANSPORTS.
        what: Masks, layouts of queries and keys, both lengths, and ranks of the ring.
        sizes: Of tensors; all ranks of a ring hold the same heads.
        has_bias: Its rows lie with the queries, and stay.
        outer_degree: Nodes of a ring of two levels whose ranks may form a grid; 1 where they may
            not.
    """
    if what[-1] == 1:
        return _KEYS
    if transport != "auto" or has_bias:
        return _OF_TRANSPORTS.get(transport, _KEYS)
    forward = queries_are_less(*what, sizes, False)
    # a backward favours queries more, whatever the head dims
    backward = forward or queries_are_less(*what, sizes, True) or queries_go_back(*what, sizes)
    moves = Moves(*("queries" if each else "keys" for each in (forward, backward)))
    if not 1 < outer_degree < what[-1]:
        return moves
    less = [
        grid_is_less(*what, sizes, outer_degree, move, bool(way)) for way, move in enumerate(moves)
    ]
    return Moves(*("both" if grid else move for grid, move in zip(less, moves, strict=True)))


@lru_cache(maxsize=64)
def queries_are_less(
    masks: Masks,
    layouts: Layouts,
    lengths: tuple[int, int],
    ring_degree: int,
    sizes: Sizes,
    backward: bool,
) -> bool:
    """Whether moving all queries that see something sends less in one pass than moving the keys
    that they see, over all ranks."""
    queries, keys = _rows_that_move(masks, layouts, lengths, ring_degree, sizes.batch)
    query, key = sizes.of_queries(backward), sizes.of_keys(backward)
    return queries * query.both < keys * key.both


def _rows_that_move(
    masks: Masks, layouts: Layouts, lengths: tuple[int, int], ring_degree: int, batch: int
) -> tuple[int, int]:
    """Rows of queries that see something of another rank, whole rows to each, and of keys."""
    keys = 0
    seen: set[tuple[int, int]] = set()
    for part in masks:
        table = needed_rows(part.mask, layouts, lengths, ring_degree)
        for rank, row in enumerate(table):
            for owner, needed in enumerate(row):
                if rank != owner and len(needed):
                    keys += part.samples.count(batch) * len(needed)
                    seen.add((rank, owner))
    queries = rows(layouts[0], lengths[0], ring_degree)
    return batch * sum(len(queries[rank]) for rank, _ in seen), keys


@lru_cache(maxsize=64)
def queries_go_back(
    masks: Masks, layouts: Layouts, lengths: tuple[int, int], ring_degree: int, sizes: Sizes
) -> bool:
    """Whether a backward sends less where queries travel, over all ranks.

    Rows are counted where a row of queries is narrower than one of keys: that few queries see many
    keys is what ``queries_are_less`` looks for.
    """
    query, key = sizes.of_queries(True), sizes.of_keys(True)
    if query.both >= key.both:
        return False
    counts, total = [part.samples.count(sizes.batch) for part in masks], []
    for needed, width in ((needed_queries, query), (needed_rows, key)):
        needs = [needed(part.mask, layouts, lengths, ring_degree) for part in masks]
        sent, returned = rows_moved("auto", needs, counts)
        total.append(sent * width.there + returned * width.back)
    return total[0] < total[1]


@lru_cache(maxsize=64)
def grid_is_less(
    masks: Masks,
    layouts: Layouts,
    lengths: tuple[int, int],
    ring_degree: int,
    sizes: Sizes,
    outer_degree: int,
    other: str,
    backward: bool,
) -> bool:
    """Whether a grid sends less in one pass than keys or queries along a ring of two levels do,
    over all ranks.

    Args:
        other: What moves where it is no grid.
    """
    key, query = sizes.of_keys(backward), sizes.of_queries(backward)
    counts = [part.samples.count(sizes.batch) for part in masks]
    needs = [needed_rows(part.mask, layouts, lengths, ring_degree) for part in masks]
    held = [len(row) for row in rows(layouts[0], lengths[0], ring_degree)]
    queries, keys = rows_on_grid(needs, held, counts, outer_degree)
    total = queries * query.both + keys[0] * key.there + keys[1] * key.back
    if other == "queries" and not backward:
        moved, _ = _rows_that_move(masks, layouts, lengths, ring_degree, sizes.batch)
        return total < moved * query.both
    width = key
    if other == "queries":
        width = query
        needs = [needed_queries(part.mask, layouts, lengths, ring_degree) for part in masks]
    sent, returned = rows_on_two_levels("auto", needs, counts, outer_degree)
    return total < sent * width.there + returned * width.back
