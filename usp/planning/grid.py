"""Plans on a grid of ranks: a rank computes a tile, queries of its node against keys of its place.

Of R = M x I ranks, M nodes of I, rank (m, i) computes the queries of all I ranks of node m against
the keys of the M ranks that have place i. So queries go round in a node, keys among ranks of one
place, and what was found comes home: ``(I - 1)`` blocks of queries and ``(M - 1)`` of keys leave a
rank where a ring sends ``R - 1`` of keys, about ``2 sqrt(R)`` on a square grid (Mesh-Attention,
arXiv:2512.20968).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from usp.planning.double_ring import between_nodes
from usp.planning.layout import Layout, rows
from usp.planning.plan import Plan, plan_of
from usp.planning.reach import needed_rows
from usp.planning.route import Arrival, Route, make_route
from usp.planning.rows import Rows, all_rows, no_rows
from usp.planning.samples import Masks

Layouts = tuple[Layout, Layout]


@dataclass(frozen=True, eq=False)
class Grid:
    """What one rank computes.

    Attributes:
        plans: Of the own queries first, then of those that come, in the order of ``query_route``:
            all with the same steps, the keys of this place.
        query_route: How queries come along the inner axis, whole rows; None where none do.
        key_route: How keys come along the outer axis, if any do.
    """

    plans: tuple[Plan, ...]
    query_route: Route | None
    key_route: Route | None


@lru_cache(maxsize=32)
def make_grid(
    masks: Masks,
    layouts: Layouts,
    lengths: tuple[int, int],
    ring_degree: int,
    ring_rank: int,
    outer_degree: int,
) -> Grid:
    """The plan of one ring rank; arguments as in ``make_plan``."""
    inner = ring_degree // outer_degree
    node, place = divmod(ring_rank, inner)
    queries, keys = (
        rows(layout, length, ring_degree) for layout, length in zip(layouts, lengths, strict=True)
    )
    needs = [needed_rows(mask, layouts, lengths, ring_degree) for _, mask, _ in masks]
    owners = [each * inner + place for each in range(outer_degree)]
    held = [tuple(all_rows(len(keys[owner])) for _ in masks) for owner in owners]
    route = make_route("ring", between_nodes(needs, outer_degree)[place], held, node)
    come = () if route is None else route.arrivals
    arrivals = [Arrival(ring_rank, held[node])]
    arrivals += [Arrival(owners[arrival.owner], arrival.cargo) for arrival in come]
    members = [node * inner + each for each in range(inner)]
    lengths_of = [len(queries[member]) for member in members]

    def sees(member: int, at: int) -> Rows:
        """All queries of a member of the node if any of them sees keys of a place."""
        column = range(at, ring_degree, inner)
        seen = any(len(table[member][owner]) for table in needs for owner in column)
        return all_rows(len(queries[member])) if seen else no_rows(len(queries[member]))

    table = [[sees(member, at) for member in members] for at in range(inner)]
    whole = [(all_rows(length),) for length in lengths_of]
    query_route = make_route("direct", [table], whole, place)
    here = [place, *(() if query_route is None else [a.owner for a in query_route.arrivals])]
    plans = tuple(
        plan_of(masks, (queries[members[each]], keys), lengths[1], arrivals, members[each], route)
        for each in here
    )
    return Grid(plans, query_route, route)
