"""Plans where queries travel and keys stay: backwards, and forwards of few queries.

What a query brings, ``q, dout, lse, delta``, and dq that goes back are fewer numbers than K, V, dK
and dV of a key where nearly as many key heads as query heads are held: for equal head dims in 16
bits where H < 1.5 G. RingX (2025) and BurstAttention (arXiv:2403.09347) do it; here by a route of
rows of queries (``planning/route.py``), so that it is trimmed, goes both ways and ends early as
that of keys does. It is a grid (``planning/grid.py``) of one block of keys.
"""

from __future__ import annotations

from functools import lru_cache

from usp.planning.grid import Grid
from usp.planning.here import Here, some_of
from usp.planning.layout import Layout, rows
from usp.planning.plan import Load, Plan, Step, make_any_route, own_step
from usp.planning.reach import needed_queries
from usp.planning.rows import all_rows
from usp.planning.samples import Masks
from usp.planning.seen import seen_of
from usp.planning.slides import Slides

Layouts = tuple[Layout, Layout]


@lru_cache(maxsize=32)
def make_query_ring(
    masks: Masks,
    layouts: Layouts,
    lengths: tuple[int, int],
    ring_degree: int,
    ring_rank: int,
    transport: str,
    outer_degree: int = 1,
) -> Grid:
    """What one ring rank computes for all of them; arguments as in ``make_plan``."""
    queries, keys = (
        rows(layout, length, ring_degree) for layout, length in zip(layouts, lengths, strict=True)
    )
    route = None
    if ring_degree > 1:
        needs = [needed_queries(mask, layouts, lengths, ring_degree) for _, mask, _ in masks]
        owned = [len(row) for row in queries]
        route = make_any_route(transport, needs, owned, outer_degree, ring_rank)
    whole, mine, key_len = all_rows(len(keys[ring_rank])), keys[ring_rank], lengths[1]
    here = Here(mine, whole, key_len, 2 * lengths[0])
    slides = [Slides(key_len) for _ in masks]
    # one owner's may come twice, some rows from either side
    steps = [(ring_rank, own_step(masks, queries[ring_rank], mine, ring_rank, key_len))]
    for arrival in () if route is None else route.arrivals:
        loads = []
        for part, some, known in zip(masks, arrival.cargo, slides, strict=True):
            at = some_of(queries[arrival.owner], some)
            (seen,) = seen_of(part.mask, at, [here], key_len, known)
            loads.append(Load(part.samples, part.query_offset, whole, seen, some))
        steps.append((arrival.owner, Step(ring_rank, tuple(loads))))
    plans = (Plan(owner, ring_degree, (step,), None, queries[owner], keys) for owner, step in steps)
    return Grid(tuple(plans), route)
