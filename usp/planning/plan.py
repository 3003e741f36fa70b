"""What to do in which order: a plan is pure data, made once on the host and cached.

For one ring rank a plan is a tuple of steps; each step computes this rank's queries against the
keys of one owner, as many of them as come here. No activations and no communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from usp.planning.double_ring import DoubleRing, make_double_ring
from usp.planning.layout import Layout, Layouts, both, rows
from usp.planning.masks.bands import Bands, joined
from usp.planning.masks.mask import Mask
from usp.planning.memory import uninitialised
from usp.planning.positions import Positions
from usp.planning.reach import needed_rows
from usp.planning.route import Arrival, Cargo, Needs, Route, make_route
from usp.planning.rows import Rows, all_rows
from usp.planning.samples import Masks, Part, Samples
from usp.planning.shares import local_row
from usp.planning.visit import Span, Visit, whole_visit


@dataclass(frozen=True, eq=False)
class Load:
    """What some samples of the batch see of one owner's keys.

    Attributes:
        samples: Which of the batch.
        query_offset: Position of their first query among the keys.
        rows: The owner's rows of keys that are here.
        seen: What they see of these, all bands at once; None where nothing is seen.
        queries: The rows of queries that are here; None for all.
    """

    samples: Samples
    query_offset: int
    rows: Rows
    seen: Visit | None
    queries: Rows | None = None

    @cached_property
    def visits(self) -> tuple[Visit, ...]:
        """Calls of a kernel that knows one band, over disjoint pairs."""
        return self.calls(1)

    def calls(self, most: int) -> tuple[Visit, ...]:
        """Calls of a kernel that takes so many bands at once."""
        if self.seen is None:
            return ()
        if most not in self._calls:
            self._calls[most] = self.seen.split(most)
        return self._calls[most]

    @cached_property
    def _calls(self) -> dict[int, tuple[Visit, ...]]:
        return {}

    def forget(self) -> None:
        """Give back what calls have on devices; it is copied there again when it is needed."""
        for visit in {visit for calls in self._calls.values() for visit in calls}:
            for span in (visit.span, vars(visit).get("seen_by")):
                if span is not None:
                    span.forget()


@dataclass(frozen=True, eq=False)
class Step:
    """One block of keys: whose it is, and what this rank's queries see of it.

    Attributes:
        owner: Ring rank whose keys these are.
        loads: One for each part of the batch.
    """

    owner: int
    loads: tuple[Load, ...]

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one sample of each part."""
        return sum(load.seen.pairs for load in self.loads if load.seen is not None)


@dataclass(frozen=True, eq=False)
class Plan:
    """The steps of one ring rank.

    Attributes:
        steps: The own keys first, then those that come, in the order of ``route``.
        route: How they come; None where nobody needs another rank's keys.
        queries: This rank's row of queries.
        keys: Every owner's row of keys.
    """

    ring_rank: int
    ring_degree: int
    steps: tuple[Step, ...]
    route: Route | DoubleRing | None
    queries: Positions
    keys: tuple[Positions, ...]

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of this rank: its work."""
        return sum(step.pairs for step in self.steps)


@lru_cache(maxsize=64)
def make_plan(
    masks: Masks,
    layout: Layouts,
    lengths: tuple[int, int],
    ring_degree: int,
    ring_rank: int,
    transport: str = "auto",
    outer_degree: int = 1,
) -> Plan:
    """The plan of one ring rank.

    Args:
        masks: Who sees whom, by global positions.
        layout: Which token is where, or which query and which key.
        lengths: Queries and keys of the whole sequences.
        ring_degree, ring_rank: Size of the ring and the place in it.
        transport: How keys come: "ring", "direct", "allgather", or "auto" for what sends least.
        outer_degree: Nodes that a double ring goes over, which divide the ring.
    """
    (query_len, key_len), layouts = lengths, both(layout)
    queries = rows(layouts[0], query_len, ring_degree)[ring_rank]
    keys = rows(layouts[1], key_len, ring_degree)
    route: Route | DoubleRing | None = None
    if ring_degree > 1:
        needs = [needed_rows(mask, layouts, lengths, ring_degree) for _, mask, _ in masks]
        owned = [len(row) for row in keys]
        route = make_any_route(transport, needs, owned, outer_degree, ring_rank)
    own = Arrival(ring_rank, tuple(all_rows(len(keys[ring_rank])) for _ in masks))
    arrivals = (own, *(route.arrivals if route is not None else ()))
    return plan_of(masks, (queries, keys), key_len, arrivals, ring_rank, route)


def plan_of(
    masks: Masks,
    placed: tuple[Positions, tuple[Positions, ...]],
    key_len: int,
    arrivals: Sequence[Arrival],
    ring_rank: int,
    route: Route | DoubleRing | None,
) -> Plan:
    """The plan of one row of queries for keys that come so.

    Args:
        masks, ring_rank: As in ``make_plan``.
        placed: The row of queries, and every owner's row of keys.
        key_len: Keys of the whole sequence.
        arrivals: The own keys first.
        route: How they come.
    """
    queries, keys = placed
    parts = parts_of(masks, queries, keys, key_len)
    steps = tuple(step_of(arrival, keys[arrival.owner], parts) for arrival in arrivals)
    return Plan(ring_rank, len(keys), steps, route, queries, keys)


def make_any_route(
    transport: str, needs: Needs, lengths: list[int], outer_degree: int, rank: int
) -> Route | DoubleRing | None:
    """A rank's route along a ring of one level, or of two.

    Args:
        transport, needs, rank: As of ``make_route``.
        lengths: Rows of each owner.
        outer_degree: As of ``make_plan``.
    """
    if 1 < outer_degree < len(lengths):
        return make_double_ring(transport, needs, lengths, outer_degree, rank)
    held = [tuple(all_rows(length) for _ in needs) for length in lengths]
    return make_route(transport, needs, held, rank)


@lru_cache(maxsize=64)
def make_local_plan(
    masks: Masks,
    layouts: tuple[Layout, Layout],
    lengths: tuple[int, int],
    degrees: tuple[int, int],
    place: tuple[int, int],
) -> Plan:
    """The plan of one rank for its own queries and keys alone, where one side is on every rank.

    Args:
        masks, lengths: As in ``make_plan``.
        layouts: Of queries and of keys, one of them ``Replicated``.
        degrees, place: Of the mesh and in it, (ring, ulysses).
    """
    queries, keys = (
        local_row(layout, length, degrees, place)
        for layout, length in zip(layouts, lengths, strict=True)
    )
    step = Step(0, loads_of(masks, queries, keys, lengths[1]))
    return Plan(0, 1, (step,), None, queries, (keys,))


class Band(NamedTuple):
    """What each row of queries sees of a band.

    Attributes:
        ends: ``first`` and ``stop``, (Lq,) int32 each.
        segments: Of the layout, in which these lie.
        edges: Of ``first`` and of ``stop``, those of the first row and of the last.
    """

    ends: tuple[Tensor, Tensor]
    segments: tuple[Tensor | None, Tensor | None]
    edges: tuple[tuple[int, int], tuple[int, int]]


class Reach(NamedTuple):
    """What so many rows of queries see."""

    num_queries: int
    bands: list[Band]


def parts_of(
    masks: Masks, queries: Positions, keys: tuple[Positions, ...], key_len: int
) -> list[tuple[Part, Reach]]:
    """What a row of queries sees, for each part of the batch."""
    return [(part, _reach_of_row(part.mask, queries, keys[0], key_len)) for part in masks]


@lru_cache(maxsize=1)  # a backward in which queries travel begins with those of its forward
def _reach_of_row(mask: Mask, queries: Positions, keys: Positions, key_len: int) -> Reach:
    return _reach(mask, queries.tensor, keys, key_len)


def _reach(mask: Mask, queries: Tensor, keys: Positions, key_len: int) -> Reach:
    """Of queries at these positions; of the keys just the segments of their layout count."""
    if not len(queries):
        return Reach(0, [])
    found = mask.bands(queries.int(), key_len)  # half the memory to go through
    segments = ((keys.segment_of(a), keys.segment_of(b)) for a, b in zip(*found, strict=True))
    edges = zip(*(ends[:, [0, -1]].tolist() for ends in found), strict=True)
    bands = zip(zip(*found, strict=True), segments, edges, strict=True)
    return Reach(len(queries), [Band(*band) for band in bands])


def loads_of(masks: Masks, queries: Positions, keys: Positions, key_len: int) -> tuple[Load, ...]:
    """What a row of queries sees of a whole row of keys, for each part of the batch."""
    here = all_rows(len(keys))
    return tuple(
        Load(
            part.samples,
            part.query_offset,
            here,
            _seen(keys, here, _reach(part.mask, queries.tensor, keys, key_len)),
        )
        for part in masks
    )


def loads_of_some(
    masks: Masks, queries: Positions, here: Cargo, keys: Positions, key_len: int
) -> tuple[Load, ...]:
    """The same of the queries that are here."""
    loads = []
    for part, some in zip(masks, here, strict=True):
        at = queries.tensor if some.are_all else queries.tensor.index_select(0, some.index)
        whole = all_rows(len(keys))
        seen = _seen(keys, whole, _reach(part.mask, at, keys, key_len))
        loads.append(Load(part.samples, part.query_offset, whole, seen, some))
    return tuple(loads)


def step_of(arrival: Arrival, keys: Positions, parts: list[tuple[Part, Reach]]) -> Step:
    """The keys of one owner that are here, and what these parts see of them."""
    both = zip(parts, arrival.cargo, strict=True)
    loads = (
        Load(part.samples, part.query_offset, here, _seen(keys, here, reach))
        for (part, reach), here in both
    )
    return Step(arrival.owner, tuple(loads))


def _seen(keys: Positions, here: Rows, reach: Reach) -> Visit | None:
    """What is seen of the rows that are here, in as few bands as can be."""
    if not reach.num_queries or not len(here):
        return None
    lowest, highest = keys.ends.tolist()
    seen = []
    for band in reach.bands:
        (first_low, first_high), (stop_low, stop_high) = band.edges
        if stop_high <= lowest or first_low > highest:
            continue
        if first_high <= lowest and stop_low > highest:
            return whole_visit(reach.num_queries, len(here))
        seen.append(band)
    ends, used = uninitialised(2, len(seen), reach.num_queries, dtype=torch.int32), 0
    for band in seen:
        first, stop = band.ends
        # the queries before these see nothing up to the block's first key, those behind them
        # nothing from its last one on
        rows = slice(
            int(torch.searchsorted(stop, lowest, right=True)),
            int(torch.searchsorted(first, highest, right=True)),
        )
        for counts, bound, segment in zip(ends[:, used], band.ends, band.segments, strict=True):
            _count_here(keys, here, bound, segment, rows, counts)
        used += not torch.equal(*ends[:, used])  # else the next one takes its place
    if not used:
        return None
    first, stop = joined(Bands(*ends[:, :used]))
    span = Span(first, stop) if len(first) > 1 else Span(first[0], stop[0])
    return Visit(reach.num_queries, len(here), span)


def _count_here(
    keys: Positions, here: Rows, bound: Tensor, segment: Tensor | None, rows: slice, out: Tensor
) -> None:
    """Into ``out``, how many of the keys that are here lie below each bound: between 0 in front of
    some rows, and all behind them."""
    out[: rows.start] = 0
    out[rows.stop :] = len(here)
    if rows.start < rows.stop:
        among = None if segment is None else segment[rows]
        below = keys.count_below(bound[rows], among, out[rows])
        if not here.are_all:
            out[rows] = here.count_below(below)
