"""The double ring: two levels of ranks, nodes and those inside a node, and a route along each.

Rank r of the ring is rank ``r % inner`` of node ``r // inner``. A block goes from node to node
along the outer axis, among ranks of one place in their nodes, with the rows that anybody there or
further on needs; it stays in a node for as long as the inner axis takes to show it to the others.
So a row crosses to a node once, over the links of all ranks alike, while the inner ring turns:
LoongTrain, arXiv:2406.18485, and BurstEngine, arXiv:2509.19836. Either axis has an ordinary route.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product

from usp.planning.route import (
    Arrival,
    Exchange,
    Needs,
    Ring,
    Sent,
    Way,
    choose_way,
    make_route,
    route_along,
    rows_along,
    rows_moved,
)
from usp.planning.rows import Rows, all_rows, union_of_rows


@dataclass(frozen=True, eq=False)
class DoubleRing:
    """How rows come to one rank.

    Attributes:
        inner_degree: Ranks of a node.
        outer: Along the outer axis; None where no row leaves a node.
        inner: Along the inner axis, of each block that the outer brings, the own one first.
        arrivals: Of the whole ring, in the order in which they come.
    """

    inner_degree: int
    outer: Ring | Exchange | None
    inner: tuple[Ring | Exchange | None, ...]
    arrivals: tuple[Arrival, ...]

    def sent(self, rank: int) -> Sent:
        """As of a ring."""
        return self._of_both(rank, "sent")

    def returned(self, rank: int) -> Sent:
        """As of a ring."""
        return self._of_both(rank, "returned")

    def _of_both(self, rank: int, which: str) -> Sent:
        node, place = divmod(rank, self.inner_degree)
        messages: Sent = []
        if self.outer is not None:
            outside: Sent = getattr(self.outer, which)(node)
            messages += [(to * self.inner_degree + place, cargo) for to, cargo in outside]
        for route in self.inner:
            inside: Sent = [] if route is None else getattr(route, which)(place)
            messages += [(node * self.inner_degree + to, cargo) for to, cargo in inside]
        return messages


def make_double_ring(
    transport: str, needs: Needs, lengths: Sequence[int], degree: int, rank: int
) -> DoubleRing | None:
    """The routes of one rank along both axes; None where nobody needs another rank's keys.

    Args:
        transport: Of TRANSPORTS, along each axis.
        needs: What each rank of the ring sees of each owner.
        lengths: Rows of keys of each owner.
        degree: Nodes, which divide the ranks.
        rank: Whose, of the ring.
    """
    inner = len(lengths) // degree
    node, place = divmod(rank, inner)
    whole = [tuple(all_rows(length) for _ in needs) for length in lengths]
    outside = between_nodes(needs, degree)
    # one way for all places: the ranks of a node work on blocks of the same node at a time
    way = choose_way(transport, [table for of_place in outside for table in of_place])
    outer = []
    for at in range(inner):
        held = [whole[each * inner + at] for each in range(degree)]
        parts = slice(at * len(needs), (at + 1) * len(needs))
        outer.append(route_along(_of_parts(way, parts), outside[at], held, node))
    brought = [[Arrival(node, whole[node * inner + at])] for at in range(inner)]
    for come, route in zip(brought, outer, strict=True):
        come.extend(() if route is None else route.arrivals)
    routes, arrivals = [], []
    for blocks in zip(*brought, strict=True):
        owners = [arrival.owner * inner + at for at, arrival in enumerate(blocks)]
        inside = _in_node(needs, inner, node, blocks[0].owner)
        route = make_route(transport, inside, [arrival.cargo for arrival in blocks], place)
        routes.append(route)
        shown = [Arrival(place, blocks[place].cargo), *(() if route is None else route.arrivals)]
        arrivals += [Arrival(owners[arrival.owner], arrival.cargo) for arrival in shown]
    if len(arrivals) == 1 and outer[place] is None and not any(routes):
        return None
    return DoubleRing(inner, outer[place], tuple(routes), tuple(arrivals[1:]))


def between_nodes(needs: Needs, degree: int) -> list[list[list[list[Rows]]]]:
    """Of each place in a node, of each part: what all ranks of a node need of the owner that has
    this place in another one."""
    inner = len(needs[0]) // degree
    nodes = range(degree)

    def of_node(table: Sequence[Sequence[Rows]], node: int, owner: int) -> Rows:
        members = table[node * inner : (node + 1) * inner]
        return reduce(union_of_rows, [row[owner] for row in members])

    return [
        [
            [[of_node(table, node, o * inner + at) for o in nodes] for node in nodes]
            for table in needs
        ]
        for at in range(inner)
    ]


def rows_on_two_levels(
    transport: str, needs: Needs, counts: Sequence[int], degree: int
) -> tuple[int, int]:
    """``rows_moved`` along both axes; arguments as there, and nodes."""
    inner, outside = len(needs[0]) // degree, between_nodes(needs, degree)
    way = choose_way(transport, [table for of_place in outside for table in of_place])
    found = [
        rows_along(_of_parts(way, slice(at * len(needs), (at + 1) * len(needs))), tables, counts)
        for at, tables in enumerate(outside)
    ]
    found += [
        rows_moved(transport, _in_node(needs, inner, node, owner), counts)
        for node, owner in product(range(degree), repeat=2)
    ]
    sent, returned = zip(*found, strict=True)
    return sum(sent), sum(returned)


def _in_node(needs: Needs, inner: int, node: int, owner: int) -> list[list[list[Rows]]]:
    """Of each part: what each rank of a node needs of each rank of another one, or of its own."""
    members, owners = (range(inner * each, inner * (each + 1)) for each in (node, owner))
    return [[[table[rank][one] for one in owners] for rank in members] for table in needs]


def _of_parts(way: Way | str | None, parts: slice) -> Way | str | None:
    """The way of some of the parts alone."""
    if way is None or isinstance(way, str):
        return way
    return {by: [[cargo[parts] for cargo in hop] for hop in hops] for by, hops in way.items()}
