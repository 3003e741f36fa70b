"""Who computes what, in tables: keys that come in steps, or queries too."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from usp.cli.console import table
from usp.planning.double_ring import DoubleRing
from usp.planning.grid import Grid
from usp.planning.plan import Load, Plan
from usp.planning.route import Ring, Route

Row = tuple[object, ...]


class Work(NamedTuple):
    """What one rank does.

    Attributes:
        queries: How many it holds.
        pairs: Visible ones of each step.
        steps: A line for each, below a line of headings.
    """

    queries: int
    pairs: list[int]
    steps: list[Row]


def of_keys_that_come(plan: Plan) -> Work:
    """Each step the keys of one owner."""
    rows: list[Row] = [("step", "owner", "comes by", "queries", "keys", "sees", "visible pairs")]
    ways = ["", *(ways_of(plan.route) if plan.route is not None else ())]
    for index, (step, way) in enumerate(zip(plan.steps, ways, strict=True)):
        (load,) = step.loads
        what = len(plan.queries), len(load.rows), sees(load), step.pairs
        rows.append((index, step.owner, way, *what))
    return Work(len(plan.queries), [step.pairs for step in plan.steps], rows)


def of_grid(grid: Grid) -> Work:
    """Each step queries of one rank, the own ones or some that came, against keys of one."""
    rows: list[Row] = [
        ("step", "queries of", "keys of", "queries", "keys", "sees", "visible pairs")
    ]
    tiles = [(plan, at) for at in range(len(grid.plans[0].steps)) for plan in grid.plans]
    pairs = []
    for index, (plan, at) in enumerate(tiles):
        step = plan.steps[at]
        (load,) = step.loads
        here = len(plan.queries if load.queries is None else load.queries)
        what = here, len(load.rows), sees(load), step.pairs
        rows.append((index, plan.ring_rank, step.owner, *what))
        pairs.append(step.pairs)
    return Work(len(grid.plans[0].queries), pairs, rows)


def balance(works: Sequence[Work], ranks: str = "ring rank") -> str:
    """One line for each rank: its tokens, its work, and its work against the mean."""
    mean = sum(sum(work.pairs) for work in works) / len(works)
    rows: list[Row] = [(ranks, "tokens", "steps", "to compute", "visible pairs", "of the mean")]
    for rank, work in enumerate(works):
        pairs, busy = sum(work.pairs), sum(n > 0 for n in work.pairs)
        share = f"{pairs / mean:.3f}" if mean else "-"
        rows.append((rank, work.queries, len(work.pairs), busy, pairs, share))
    return table(rows)


def ways_of(route: Route | DoubleRing) -> list[str]:
    """How each block that comes has come, in the order of ``route.arrivals``."""
    if isinstance(route, DoubleRing):
        outside = [] if route.outer is None else ways_of(route.outer)
        inside = [[] if each is None else ways_of(each) for each in route.inner]
        lines = inside[0]
        for come, shown in zip(outside, inside[1:], strict=True):
            lines = [*lines, f"between nodes: {come}", *shown]
        return lines
    if not isinstance(route, Ring):
        return ["allgather" if route.gathers else "direct"] * len(route.arrivals)
    each = ([(way.by, hop) for hop in range(1, len(way.hops) + 1)] for way in route.directions)
    ways = (way for hops in zip_longest(*each) for way in hops if way is not None)
    return [f"hop {hop} from the rank {'before' if by == 1 else 'behind'}" for by, hop in ways]


def sees(load: Load) -> str:
    """What a kernel has to do: nothing, a rectangle, or so many intervals for each query."""
    if not load.visits:
        return "none"
    if load.visits[0].span is None:
        return "all"
    return "span" if len(load.visits) == 1 else f"{len(load.visits)} spans"
