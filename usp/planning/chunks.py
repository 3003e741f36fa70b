"""Plans where a sequence is worked off in chunks: pure data.

A chunk is a piece of the tokens of each rank of a mesh row, so that the head exchange of a chunk is
that of a shorter sequence. Keys come chunk by chunk, the own ones and behind them those of other
rows; each that comes is a page. The first chunk of queries meets every page as it comes, the others
find what they see of them waiting. What travels is what travels without chunks, cut.

Source: FPDT, arXiv:2408.16978.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch

from usp.planning.double_ring import DoubleRing
from usp.planning.here import some_of
from usp.planning.plan import Load, Plan, Step, steps_of
from usp.planning.route import Arrival, Cargo, Direction, Exchange, Hop, Ring, Route
from usp.planning.rows import Rows, all_rows, no_rows, rows_between
from usp.planning.samples import Masks
from usp.planning.shares import pieces

AnyRoute = Route | DoubleRing


@dataclass(frozen=True, eq=False)
class Page:
    """Keys of one owner that come together.

    Attributes:
        chunk: Which of the owner's chunks they are of.
        is_own: Whether the owner is this rank.
        last: Last chunk of queries that sees any of them; -1 where none does.
    """

    chunk: int
    is_own: bool
    last: int


@dataclass(frozen=True, eq=False)
class Chunks:
    """The work of one ring rank, chunk by chunk.

    Attributes:
        queries, keys: Of each chunk, tokens of each rank of the mesh row.
        rows: Of each chunk, which of the row's queries it holds.
        pages: In the order in which they come.
        routes: Of each chunk of keys; None where no keys travel.
        plans: Of each chunk of queries. The first step is of no keys; the owner of another one is a
            page, by number.
    """

    queries: tuple[tuple[int, ...], ...]
    keys: tuple[tuple[int, ...], ...]
    rows: tuple[Rows, ...]
    pages: tuple[Page, ...]
    routes: tuple[AnyRoute | None, ...]
    plans: tuple[Plan, ...]


@lru_cache(maxsize=32)
def make_chunks(
    plan: Plan,
    masks: Masks,
    key_len: int,
    query_lengths: tuple[int, ...],
    key_lengths: tuple[tuple[int, ...], ...],
    count: int,
) -> Chunks:
    """A plan in chunks.

    Args:
        plan: Of the whole.
        masks, key_len: As in ``make_plan``.
        query_lengths: Queries of each rank of the mesh row.
        key_lengths: Keys of each rank, of each row of the mesh.
        count: Of chunks; the same on all ranks.
    """
    queries = _cut(query_lengths, count)
    keys = [_cut(lengths, count) for lengths in key_lengths]
    own = keys[plan.ring_rank]
    routes = [_part_of(plan.route, [row[j] for row in keys], plan.ring_rank) for j in range(count)]
    arrivals: list[tuple[int, Arrival]] = []
    for j, route in enumerate(routes):
        mine = Arrival(plan.ring_rank, tuple(all_rows(len(own[j])) for _ in masks))
        arrivals += [(j, each) for each in (mine, *(route.arrivals if route else ()))]
    positions = [some_of(plan.keys[each.owner], keys[each.owner][j]) for j, each in arrivals]
    plans, last = [], [-1] * len(arrivals)
    for i, rows in enumerate(queries):
        some = some_of(plan.queries, rows)
        come = [each for _, each in arrivals]
        steps = [Step(0, tuple(Load(p.samples, p.query_offset, no_rows(0), None) for p in masks))]
        for page, step in enumerate(steps_of(masks, some, come, positions, key_len)):
            step = replace(step, owner=page)
            is_seen = any(load.seen is not None for load in step.loads)
            if is_seen:
                last[page] = i
            if is_seen or i == 0:
                steps.append(step)
        degree = len(arrivals) + 1  # no page holds all keys
        plans.append(Plan(0, degree, tuple(steps), None, some, tuple(positions)))
    pages = zip(arrivals, last, strict=True)
    return Chunks(
        _lengths(query_lengths, count),
        _lengths(key_lengths[plan.ring_rank], count),
        queries,
        tuple(Page(j, each.owner == plan.ring_rank, seen) for (j, each), seen in pages),
        tuple(routes),
        tuple(plans),
    )


def _lengths(lengths: Sequence[int], count: int) -> tuple[tuple[int, ...], ...]:
    """Tokens of each rank, of each chunk."""
    return tuple(zip(*(pieces(length, count) for length in lengths), strict=True))


def _cut(lengths: Sequence[int], count: int) -> tuple[Rows, ...]:
    """The rows of each chunk, among those of all ranks of a mesh row."""
    each = [tuple(accumulate(pieces(length, count), initial=0)) for length in lengths]
    before = list(accumulate(lengths, initial=0))
    return tuple(
        rows_between(
            before[-1],
            *(
                torch.tensor(
                    [b + ends[at] for b, ends in zip(before, each, strict=False)], device="cpu"
                )
                for at in (chunk, chunk + 1)
            ),
        )
        for chunk in range(count)
    )


def _part_of(route: AnyRoute | None, chunks: Sequence[Rows], rank: int) -> AnyRoute | None:
    """The way of one chunk of each owner: the same hops, with so much less in each message.

    Args:
        chunks: Of each owner, rows of its keys.
        rank: Whose route.
    """
    if not isinstance(route, DoubleRing):
        return _along(route, chunks, rank)
    inner, (node, place) = route.inner_degree, divmod(rank, route.inner_degree)
    outer = _along(route.outer, chunks[place::inner], node)
    brought = [(node, None), *_brought(route.outer)]
    inside = [
        _along(each, chunks[of * inner : (of + 1) * inner], place, held)
        for (of, held), each in zip(brought, route.inner, strict=True)
    ]
    arrivals = tuple(_arrival(arrival, chunks) for arrival in route.arrivals)
    return DoubleRing(inner, outer, tuple(inside), arrivals)


def _brought(route: Route | None) -> list[tuple[int, Cargo]]:
    return [] if route is None else [(each.owner, each.cargo) for each in route.arrivals]


def _along(
    route: Route | None, chunks: Sequence[Rows], rank: int, held: Cargo | None = None
) -> Route | None:
    """Along one axis.

    Args:
        held: Of the rank's own rows those that it has at the beginning; None is all.
    """
    if route is None:
        return None
    if isinstance(route, Exchange):
        sent = tuple(_passed(cargo, chunks[rank], held) for cargo in route.sent_to)
        come = tuple(_arrival(arrival, chunks) for arrival in route.arrivals)
        return Exchange(sent, come, route.gathers)
    return Ring(tuple(_direction(each, chunks, rank, held) for each in route.directions))


def _direction(
    direction: Direction, chunks: Sequence[Rows], rank: int, held: Cargo | None
) -> Direction:
    hops, own = [], _passed(direction.own, chunks[rank], held)
    for hop in direction.hops:
        passed = _passed(hop.passed, chunks[hop.owner], held)
        hops.append(Hop(hop.owner, passed, _arrival(hop.arrival, chunks)))
        held = hop.arrival.cargo
    first = tuple(_among(cargo, rows) for cargo, rows in zip(direction.first, chunks, strict=True))
    return Direction(direction.by, tuple(hops), direction.reach, first, own)


def _passed(cargo: Cargo, chunk: Rows, held: Cargo | None) -> Cargo:
    """Places in what is held as places in what is held of the chunk."""
    if held is None:
        return _among(cargo, chunk)
    return tuple(r.among(chunk.among(of)) for r, of in zip(cargo, held, strict=True))


def _arrival(arrival: Arrival, chunks: Sequence[Rows]) -> Arrival:
    return Arrival(arrival.owner, _among(arrival.cargo, chunks[arrival.owner]))


def _among(cargo: Cargo, chunk: Rows) -> Cargo:
    return tuple(rows.among(chunk) for rows in cargo)
