"""Plans where queries move and keys stay: few queries over many keys.

A rank computes the queries of all ranks that see its keys; each rank merges what the others found
for its own. Latents, pooling by attention and decoding send that much less.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from usp.planning.layout import Layout, Positions, rows
from usp.planning.plan import Load, loads_of
from usp.planning.problem import state_dtype
from usp.planning.reach import needed_rows
from usp.planning.samples import Masks

Layouts = tuple[Layout, Layout]


@dataclass(frozen=True, eq=False)
class QueryPlan:
    """What one ring rank computes for all of them.

    Attributes:
        queries: Every rank's row of queries.
        keys: This rank's row of keys.
        loads: Of each rank's queries, what they see of these keys; one for each part of the batch.
        sees: Of each rank, by owner, whether its queries see keys of that owner.
    """

    ring_rank: int
    ring_degree: int
    queries: tuple[Positions, ...]
    keys: Positions
    loads: tuple[tuple[Load, ...], ...]
    sees: tuple[tuple[bool, ...], ...]

    @property
    def readers(self) -> list[int]:
        """Other ranks whose queries see keys of this one."""
        others = range(self.ring_degree)
        return [r for r in others if r != self.ring_rank and self.sees[r][self.ring_rank]]

    @property
    def owners(self) -> list[int]:
        """Other ranks of whose keys the queries of this one see some."""
        mine = self.ring_rank
        return [owner for owner, seen in enumerate(self.sees[mine]) if seen and owner != mine]


@lru_cache(maxsize=32)
def make_query_plan(
    masks: Masks, layouts: Layouts, lengths: tuple[int, int], ring_degree: int, ring_rank: int
) -> QueryPlan:
    """The plan of one ring rank; arguments as in ``make_plan``."""
    queries, keys = (
        rows(layout, length, ring_degree) for layout, length in zip(layouts, lengths, strict=True)
    )
    mine = keys[ring_rank]
    loads = tuple(loads_of(masks, row, mine, lengths[1]) for row in queries)
    needs = [needed_rows(part.mask, layouts, lengths, ring_degree) for part in masks]
    ranks = range(ring_degree)
    sees = tuple(
        tuple(any(len(part[rank][owner]) for part in needs) for owner in ranks) for rank in ranks
    )
    return QueryPlan(ring_rank, ring_degree, queries, mine, loads, sees)


@dataclass(frozen=True)
class Widths:
    """Bytes of one token in a forward with its backward, where its keys move or its queries.

    Attributes:
        query, key: Of all heads that a ring holds.
    """

    query: int
    key: int


def widths(
    num_heads: int, num_kv_heads: int, head_dims: tuple[int, int], dtype: torch.dtype
) -> Widths:
    """Of the heads that a ring holds.

    Args:
        head_dims: D and Dv.
    """
    (dim, value_dim), size, wide = head_dims, dtype.itemsize, state_dtype(dtype).itemsize
    # q there; out, lse back; q, dout, out, lse, delta there; dq back
    query = num_heads * ((2 * dim + 2 * value_dim) * size + (value_dim + 1 + 2 + dim) * wide)
    return Widths(query, num_kv_heads * (dim + value_dim) * (2 * size + wide))


@lru_cache(maxsize=64)
def queries_are_less(
    masks: Masks,
    layouts: Layouts,
    lengths: tuple[int, int],
    ring_degree: int,
    widths: Widths,
    batch: int,
) -> bool:
    """Whether moving queries sends less than moving the keys that they see, over all ranks."""
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
    moved = batch * sum(len(queries[rank]) for rank, _ in seen)
    return moved * widths.query < keys * widths.key
