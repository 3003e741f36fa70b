"""What to do in which order: a plan is pure data, made once on the host and cached.

For one ring rank a plan is a tuple of steps; each step computes this rank's queries against the
keys of one owner, as many of them as come here. No activations and no communication.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from usp.planning.layout import Layout, Layouts, Positions, both, rows
from usp.planning.masks.bands import Bands, joined
from usp.planning.masks.mask import Mask
from usp.planning.reach import needed_rows
from usp.planning.route import Arrival, Route, make_route
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
        visits: Calls of a kernel, over disjoint pairs; none where nothing is seen.
    """

    samples: Samples
    query_offset: int
    rows: Rows
    visits: tuple[Visit, ...]


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
        return sum(visit.pairs for load in self.loads for visit in load.visits)


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
    route: Route | None
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
) -> Plan:
    """The plan of one ring rank.

    Args:
        masks: Who sees whom, by global positions.
        layout: Which token is where, or which query and which key.
        lengths: Queries and keys of the whole sequences.
        ring_degree, ring_rank: Size of the ring and the place in it.
        transport: How keys come: "ring", "direct", "allgather", or "auto" for what sends least.
    """
    (query_len, key_len), layouts = lengths, both(layout)
    queries = rows(layouts[0], query_len, ring_degree)[ring_rank]
    keys = rows(layouts[1], key_len, ring_degree)
    route = None
    if ring_degree > 1:
        needs = [needed_rows(mask, layouts, lengths, ring_degree) for _, mask, _ in masks]
        route = make_route(transport, needs, [len(row) for row in keys], ring_rank)
    parts = [(part, _reach(part.mask, queries, keys, key_len)) for part in masks]
    own = Arrival(ring_rank, tuple(all_rows(len(keys[ring_rank])) for _ in masks))
    arrivals = (own, *(route.arrivals if route is not None else ()))
    steps = tuple(_step(arrival, keys[arrival.owner], parts) for arrival in arrivals)
    return Plan(ring_rank, ring_degree, steps, route, queries, keys)


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


class Reach(NamedTuple):
    """What each row of queries sees, and the segments of the layout in which that lies."""

    bands: Bands
    segments: list[tuple[Tensor | None, Tensor | None]]


def _reach(mask: Mask, queries: Positions, keys: tuple[Positions, ...], key_len: int) -> Reach:
    bands = mask.bands(queries.tensor.int(), key_len)  # half the memory to go through
    segments = [
        (keys[0].segment_of(first), keys[0].segment_of(stop))
        for first, stop in zip(*bands, strict=True)
    ]
    return Reach(bands, segments)


def loads_of(masks: Masks, queries: Positions, keys: Positions, key_len: int) -> tuple[Load, ...]:
    """What a row of queries sees of a whole row of keys, for each part of the batch."""
    here = all_rows(len(keys))
    return tuple(
        Load(
            part.samples,
            part.query_offset,
            here,
            _visits(keys, here, _reach(part.mask, queries, (keys,), key_len)),
        )
        for part in masks
    )


def _step(arrival: Arrival, keys: Positions, parts: list[tuple[Part, Reach]]) -> Step:
    both = zip(parts, arrival.cargo, strict=True)
    loads = (
        Load(part.samples, part.query_offset, here, _visits(keys, here, reach))
        for (part, reach), here in both
    )
    return Step(arrival.owner, tuple(loads))


def _visits(keys: Positions, here: Rows, reach: Reach) -> tuple[Visit, ...]:
    """What is seen of the rows that are here, in as few calls as the bands allow."""
    num_queries = reach.bands.first.shape[1]
    if not num_queries or not len(here):
        return ()
    lowest, highest = keys.ends
    ends = reach.bands.first.new_empty((2, *reach.bands.first.shape))
    found = 0
    for first, stop, segments in zip(*reach.bands, reach.segments, strict=True):
        if stop[-1] <= lowest or first[0] > highest:
            continue
        if first[-1] <= lowest and stop[0] > highest:
            return (whole_visit(num_queries, len(here)),)
        # the queries before these see nothing up to the block's first key, those behind them
        # nothing from its last one on
        start = int(torch.searchsorted(stop, int(lowest), right=True))
        end = int(torch.searchsorted(first, int(highest), right=True))
        for counts, bound, segment in zip(ends[:, found], (first, stop), segments, strict=True):
            counts[:start] = 0
            counts[end:] = len(here)
            if start < end:
                among = None if segment is None else segment[start:end]
                below = keys.count_below(bound[start:end], among)
                counts[start:end] = here.count_below(below)
        found += 1
    bands = joined(Bands(*ends[:, :found]))
    spans = (Span(first, stop) for first, stop in zip(*bands, strict=True))
    return tuple(Visit(num_queries, len(here), span, span.pairs) for span in spans if span.pairs)
