"""Plans on a grid of ranks: a rank computes a tile, queries of its node against keys of its place.

Of R = M x I ranks, M nodes of I, rank (m, i) computes the queries of all I ranks of node m against
the keys of the M ranks that have place i. So queries go round in a node, keys among ranks of one
place, and what was found comes home: ``(I - 1)`` blocks of queries and ``(M - 1)`` of keys leave a
rank where a ring sends ``R - 1`` of keys, about ``2 sqrt(R)`` on a square grid (Mesh-Attention,
arXiv:2512.20968).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from usp.planning.double_ring import DoubleRing, between_nodes
from usp.planning.layout import Layout, rows
from usp.planning.plan import Plan, plan_of
from usp.planning.reach import needed_rows
from usp.planning.route import Arrival, Needs, Route, make_route, rows_moved
from usp.planning.rows import Rows, all_rows, no_rows
from usp.planning.samples import Masks

Layouts = tuple[Layout, Layout]


@dataclass(frozen=True, eq=False)
class Grid:
    """What one rank computes: queries of some ranks against keys of some.

    Attributes:
        plans: Of the own queries first, then of those that come, in the order of ``query_route``:
            all with the same steps, the blocks of keys, and the same route of these.
        query_route: How queries come; None where none do.
    """

    plans: tuple[Plan, ...]
    query_route: Route | DoubleRing | None


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
    whole_rows = [
        [
            [
                all_rows(length) if _sees(table, member, at, inner) else no_rows(length)
                for member, length in zip(members, lengths_of, strict=True)
            ]
            for at in range(inner)
        ]
        for table in needs
    ]
    whole = [tuple(all_rows(length) for _ in masks) for length in lengths_of]
    query_route = make_route("direct", whole_rows, whole, place)
    here = [place, *(() if query_route is None else [a.owner for a in query_route.arrivals])]
    plans = tuple(
        plan_of(masks, (queries[members[each]], keys), lengths[1], arrivals, members[each], route)
        for each in here
    )
    return Grid(plans, query_route)


def rows_on_grid(
    needs: Needs, lengths: Sequence[int], counts: Sequence[int], outer_degree: int
) -> tuple[int, tuple[int, int]]:
    """Rows of queries that all ranks of a ring send together in their nodes, and of keys, as
    ``rows_moved`` counts them.

    Args:
        needs: What each rank of the ring sees of each owner.
        lengths: Queries of each rank.
        counts: Samples of each part of the batch.
    """
    inner = len(lengths) // outer_degree
    queries = sum(
        count * length
        for count, table in zip(counts, needs, strict=True)
        for rank, length in enumerate(lengths)
        for at in range(inner)
        if at != rank % inner and _sees(table, rank, at, inner)
    )
    found = [
        rows_moved("ring", of_place, counts) for of_place in between_nodes(needs, outer_degree)
    ]
    sent, returned = zip(*found, strict=True)
    return queries, (sum(sent), sum(returned))


def _sees(table: Sequence[Sequence[Rows]], rank: int, at: int, inner: int) -> bool:
    """Whether any query of a rank sees keys of a place."""
    return any(len(rows) for rows in table[rank][at::inner])
