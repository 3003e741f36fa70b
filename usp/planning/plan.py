"""What to do in which order: a plan is pure data, made once on the host and cached.

For one ring rank a plan is a tuple of steps; each step computes this rank's queries against the
keys of one owner, as many of them as come here. No activations and no communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from usp.planning.double_ring import DoubleRing, make_double_ring
from usp.planning.here import Here
from usp.planning.layout import Layout, Layouts, both, rows
from usp.planning.positions import Positions
from usp.planning.reach import needed_rows
from usp.planning.route import Arrival, Needs, Route, make_route
from usp.planning.rows import Rows, all_rows
from usp.planning.samples import Masks, Samples
from usp.planning.seen import seen_of
from usp.planning.shares import local_row
from usp.planning.visit import Visit


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


# Of the plan made last: a backward in which queries travel begins with the step of its forward.
_own_steps: dict[tuple[Masks, Positions, Positions, int, int], Step] = {}


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
        arrivals: The own keys first, all of them.
        route: How they come.
    """
    (queries, keys), own = placed, arrivals[0].owner
    held = [keys[arrival.owner] for arrival in arrivals]
    steps = steps_of(masks, queries, arrivals, held, key_len)
    _own_steps.clear()
    _own_steps[masks, queries, keys[own], own, key_len] = steps[0]
    return Plan(ring_rank, len(keys), tuple(steps), route, queries, keys)


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
    step = own_step(masks, queries, keys, 0, lengths[1])
    return Plan(0, 1, (step,), None, queries, (keys,))


def steps_of(
    masks: Masks,
    queries: Positions,
    arrivals: Sequence[Arrival],
    keys: Sequence[Positions],
    key_len: int,
) -> list[Step]:
    """What a row of queries sees of the keys that come, for each part of the batch.

    Args:
        keys: Of the owner of each arrival, all of its row.
    """
    loads = []
    for index, part in enumerate(masks):
        cargo = (arrival.cargo[index] for arrival in arrivals)
        here = [Here(*each, key_len, 2 * len(queries)) for each in zip(keys, cargo, strict=True)]
        seen = zip(here, seen_of(part.mask, queries, here, key_len), strict=True)
        loads.append([Load(part.samples, part.query_offset, each.rows, v) for each, v in seen])
    of_each = zip(*loads, strict=True)
    return [Step(arrival.owner, each) for arrival, each in zip(arrivals, of_each, strict=True)]


def own_step(masks: Masks, queries: Positions, keys: Positions, owner: int, key_len: int) -> Step:
    """What a row of queries sees of all keys of one owner."""
    kept = _own_steps.get((masks, queries, keys, owner, key_len))
    if kept is not None:
        return kept
    own = Arrival(owner, tuple(all_rows(len(keys)) for _ in masks))
    return steps_of(masks, queries, [own], [keys], key_len)[0]
