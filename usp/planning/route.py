"""How keys come to the ranks that see them, and how their gradients come home: pure data.

``ring`` passes blocks on from neighbour to neighbour, in the direction, or both, that needs fewer
hops; a hop carries the rows that somebody further on still needs. ``direct`` sends rows from their
owner to whoever needs them, ``allgather`` all rows to all, both in one exchange.

Cargo of several parts of the batch, each with rows of its own, travels as one message: a tuple of
``Rows``, one for each part. A rank may hold just some rows of a block that is not its own, and pass
these on among others (``planning/double_ring.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

from usp.planning.rows import Rows, all_rows, no_rows, union_of_rows

TRANSPORTS = ("auto", "ring", "direct", "allgather", "queries", "query_ring", "grid")
Cargo = tuple[Rows, ...]

# Messages: to which rank, which rows.
Sent = list[tuple[int, Cargo]]
# Of each part of the batch, of each rank, by owner: the owner's rows that the rank sees.
Needs = Sequence[Sequence[Sequence[Rows]]]


@dataclass(frozen=True, eq=False)
class Arrival:
    """Rows of keys that come to this rank.

    Attributes:
        owner: Whose they are.
        cargo: Which of the owner's rows.
    """

    owner: int
    cargo: Cargo


@dataclass(frozen=True, eq=False)
class Hop:
    """One message passed on, and one that comes.

    Attributes:
        owner: Whose keys this rank passes on.
        passed: Which of them, by their places in what it holds of that owner.
        arrival: What comes meanwhile.
    """

    owner: int
    passed: Cargo
    arrival: Arrival


@dataclass(frozen=True, eq=False)
class Direction:
    """Blocks that move by one rank at each hop, and gradients behind them.

    Attributes:
        by: 1 or -1, to the next rank or to the one before.
        hops: Of this rank.
        reach: Of each owner, how many hops its keys are needed; their gradients turn home there.
        first: Of each owner, its rows that are needed by anybody in this direction: gradients are
            summed for these.
        own: Those of this rank, by their places in what it holds.
    """

    by: int
    hops: tuple[Hop, ...]
    reach: tuple[int, ...]
    first: tuple[Cargo, ...]
    own: Cargo

    @property
    def degree(self) -> int:
        return len(self.reach)


@dataclass(frozen=True, eq=False)
class Ring:
    """Blocks passed on from rank to rank."""

    directions: tuple[Direction, ...]

    @property
    def arrivals(self) -> tuple[Arrival, ...]:
        """In the order in which they come, from both sides in turn."""
        each = (direction.hops for direction in self.directions)
        return tuple(hop.arrival for hops in zip_longest(*each) for hop in hops if hop is not None)

    def sent(self, rank: int) -> Sent:
        """Rows of keys in each message that leaves a rank; this is its route."""
        return [
            ((rank + direction.by) % direction.degree, hop.passed)
            for direction in self.directions
            for hop in direction.hops
        ]

    def returned(self, rank: int) -> Sent:
        """Rows of gradients in each message that leaves it in the backward."""
        messages = []
        for way in self.directions:
            for distance, hop in enumerate(way.hops, 1):
                owner = hop.arrival.owner
                if distance <= way.reach[owner]:
                    last = distance == way.reach[owner]
                    to = owner if last else (rank + way.by) % way.degree
                    messages.append((to, way.first[owner]))
        return messages


@dataclass(frozen=True, eq=False)
class Exchange:
    """Rows sent straight to those who need them.

    Attributes:
        sent_to: For each rank, which of this rank's own rows, by their places in what it holds.
        arrivals: From each owner in turn.
        gathers: Whether all ranks get all rows.
    """

    sent_to: tuple[Cargo, ...]
    arrivals: tuple[Arrival, ...]
    gathers: bool

    def sent(self, rank: int) -> Sent:
        """As of a ring."""
        return [(to, cargo) for to, cargo in enumerate(self.sent_to) if to != rank]

    def returned(self, rank: int) -> Sent:
        """As of a ring."""
        return [(arrival.owner, arrival.cargo) for arrival in self.arrivals]


Route = Ring | Exchange


def of_keys(transport: str) -> str:
    """How keys travel where they do."""
    return "ring" if transport == "query_ring" else transport


def of_query_steps(transport: str) -> str:
    """How queries travel in a backward where they do."""
    return {"queries": "direct", "query_ring": "ring"}.get(transport, transport)


def make_route(transport: str, needs: Needs, held: Sequence[Cargo], rank: int) -> Route | None:
    """How keys come to a rank and leave it; None where nobody needs those of another rank.

    Args:
        transport: Of TRANSPORTS; "auto" is the ring where it sends no row more than direct messages
            do: its buffers are smaller, and more of it is in flight while blocks compute.
        needs: What each rank sees of each owner.
        held: Rows that each rank has of its block at the beginning: all of them, of its own.
        rank: Whose route.
    """
    return route_along(choose_way(transport, needs), needs, held, rank)


def choose_way(transport: str, needs: Needs) -> Way | str | None:
    """How rows come to all ranks: along a ring as told, "direct", "allgather", or not at all."""
    each = [(rank, row) for part in needs for rank, row in enumerate(part)]
    direct = sum(sum(map(len, row)) - len(row[rank]) for rank, row in each)
    if not direct:
        return None
    if transport in ("direct", "allgather"):
        return transport
    if transport == "ring":
        return _best(_ways(needs), direct)
    return next(_ways(needs, nested=True), "direct")


def route_along(
    way: Way | str | None, needs: Needs, held: Sequence[Cargo], rank: int
) -> Route | None:
    """The route of one rank; arguments as of ``make_route``."""
    if way is None:
        return None
    ranks = range(len(held))
    if way == "allgather":
        whole = tuple(all_rows(len(rows)) for rows in held[rank])
        return Exchange((whole,) * len(held), _around(rank, held), gathers=True)
    if not isinstance(way, str):
        made = (_direction(by, hops, held, rank) for by, hops in way.items() if hops)
        return Ring(tuple(made))
    sent = tuple(within(_cargo(needs, other, rank), held[rank]) for other in ranks)
    come = tuple(_cargo(needs, rank, owner) for owner in ranks)
    return Exchange(sent, _around(rank, come), gathers=False)


def rows_moved(transport: str, needs: Needs, counts: Sequence[int]) -> tuple[int, int]:
    """Rows that all ranks send together, and rows of gradients that go home.

    Args:
        transport, needs: As of ``make_route``.
        counts: Samples of each part of the batch.
    """
    return rows_along(choose_way(transport, needs), needs, counts)


def rows_along(way: Way | str | None, needs: Needs, counts: Sequence[int]) -> tuple[int, int]:
    """The same where the way is known."""
    ranks = range(len(needs[0]))

    def size(cargo: Cargo) -> int:
        return sum(count * len(rows) for count, rows in zip(counts, cargo, strict=True))

    if way is None or isinstance(way, str):
        pairs = [(rank, owner) for rank in ranks for owner in ranks if rank != owner]
        total = sum(size(_cargo(needs, *pair)) for pair in pairs)
        return total, total
    carried = [hops for hops in way.values() if hops]
    sent = sum(size(cargo) for hops in carried for hop in hops for cargo in hop)
    returned = sum(_reach(hops, r) * size(hops[0][r]) for hops in carried for r in ranks)
    return sent, returned


# Of each direction, of each hop, by owner: its rows that a rank so far away or further needs.
Way = dict[int, list[list[Cargo]]]


def _best(ways: Iterator[Way], direct: int) -> Way:
    """The first that sends no more rows than direct messages do, or that which sends least."""
    best: tuple[int, Way] | None = None
    for way in ways:
        rows = sum(len(r) for hops in way.values() for hop in hops for c in hop for r in c)
        if best is None or rows < best[0]:
            best = rows, way
        if rows == direct:
            break
    assert best is not None
    return best[1]


def _ways(needs: Needs, nested: bool = False) -> Iterator[Way]:
    """Ways round for rows to those who need them, those of few hops first.

    To each side so far: as evenly as blocks are needed at all, or nearly all to one side; or never
    across the ends of the ring. In a causal zigzag the ranks behind an owner need half of its
    block, those before it all, and a rank must not pass on more than those behind it need.

    Args:
        nested: Just those that send no row more than direct messages do: no rank gets what it does
            not see.
    """
    degree = len(needs[0])
    needed = {
        (rank - owner) % degree
        for part in needs
        for rank, row in enumerate(part)
        for owner, rows in enumerate(row)
        if rank != owner and len(rows)
    }
    ends = zip([0, *sorted(needed)], [*sorted(needed), degree], strict=True)
    both = [(forwards, degree - after) for forwards, after in ends]
    even = min(both, key=lambda way: (sum(way), max(way), -way[0]))
    each = dict.fromkeys((even[0], 1, degree - 2, degree - 1, 0))
    sides: list[Callable[[int, int], bool]]
    sides = [partial(_is_near, degree, forwards) for forwards in each]
    for goes_forwards in (*sides, _never_across):
        way = _way(needs, goes_forwards, nested)
        if way is not None:
            yield way


def _never_across(owner: int, rank: int) -> bool:
    """Whether a rank lies behind an owner in the order of all."""
    return owner < rank


def _is_near(degree: int, far: int, owner: int, rank: int) -> bool:
    """Whether a rank lies at most so many places behind an owner."""
    return (rank - owner) % degree <= far


def _way(needs: Needs, goes_forwards: Callable[[int, int], bool], nested: bool) -> Way | None:
    degree = len(needs[0])
    way: Way = {}
    for by in (1, -1):
        each: list[list[Cargo]] = []
        for owner in range(degree):
            nothing = tuple(no_rows(rows.total) for rows in _cargo(needs, owner, owner))
            carried: list[Cargo] = [nothing]
            for hop in range(degree - 1, 0, -1):
                rank = (owner + by * hop) % degree
                here = nothing
                if goes_forwards(owner, rank) == (by == 1):
                    here = _cargo(needs, rank, owner)
                both = [*zip(here, carried[-1], strict=True)]
                if nested and any(len(far) > len(near) for near, far in both):
                    return None
                carried.append(tuple(union_of_rows(near, far) for near, far in both))
                if nested and list(map(len, here)) != list(map(len, carried[-1])):
                    return None
            each.append(carried[:0:-1])
        hops = zip(*each, strict=True)
        way[by] = [list(hop) for hop in hops if any(len(rows) for cargo in hop for rows in cargo)]
    return way


def _cargo(needs: Needs, rank: int, owner: int) -> Cargo:
    return tuple(part[rank][owner] for part in needs)


def within(cargo: Cargo, held: Cargo) -> Cargo:
    """Rows by their places among those that are held."""
    return tuple(rows.within(those) for rows, those in zip(cargo, held, strict=True))


def _around(rank: int, cargo: Sequence[Cargo]) -> tuple[Arrival, ...]:
    """What comes from the other ranks, from the one before backwards."""
    owners = [(rank - step) % len(cargo) for step in range(1, len(cargo))]
    return tuple(Arrival(owner, cargo[owner]) for owner in owners)


def _reach(hops: list[list[Cargo]], owner: int) -> int:
    return sum(any(map(len, hop[owner])) for hop in hops)


def _direction(by: int, hops: list[list[Cargo]], held: Sequence[Cargo], rank: int) -> Direction:
    made, degree = [], len(held)
    for index, carried in enumerate(hops):
        passing, coming = (rank - by * index) % degree, (rank - by * (index + 1)) % degree
        here = hops[index - 1][passing] if index else held[passing]
        arrival = Arrival(coming, carried[coming])
        made.append(Hop(passing, within(carried[passing], here), arrival))
    owners = range(degree)
    reach = tuple(_reach(hops, owner) for owner in owners)
    own = within(hops[0][rank], held[rank])
    return Direction(by, tuple(made), reach, tuple(hops[0]), own)
