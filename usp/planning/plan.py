"""What to do in which order: a plan is pure data, made once on the host and cached.

For one ring rank a plan is a tuple of steps; step t computes this rank's queries against the
keys of one owner. No activations and no communication here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from usp.planning.layout import Layout, Positions, rows
from usp.planning.mask import Mask


@dataclass(frozen=True, eq=False)
class Span:
    """For each local query row the local keys ``[first, stop)`` it sees.

    Attributes:
        first, stop: (Lq,) int32 on CPU, non-decreasing, first <= stop.
    """

    first: Tensor
    stop: Tensor

    @cached_property
    def pairs(self) -> int:
        """Number of visible (query, key) pairs."""
        return int((self.stop - self.first).sum(dtype=torch.int64))

    @cached_property
    def _on_device(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``first, stop`` on ``device``, copied there once."""
        if device.type == "cpu":
            return self.first, self.stop
        if device not in self._on_device:
            self._on_device[device] = (self.first.to(device), self.stop.to(device))
        return self._on_device[device]


def transposed(first: Tensor, stop: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """For each key the rows ``[first, stop)`` that see it, an interval too, int32.

    Args:
        first, stop: (Lq,) int32, non-decreasing: the keys that each row sees.
        num_keys: Lk.
    """
    keys = torch.arange(num_keys, dtype=first.dtype, device=first.device)
    first_row = torch.searchsorted(stop, keys, right=True, out_int32=True)
    stop_row = torch.searchsorted(first, keys, right=True, out_int32=True)
    return first_row, stop_row


@dataclass(frozen=True, eq=False)
class Step:
    """One block of keys: whose it is, and what this rank's queries see of it.

    Attributes:
        owner: Ring rank whose keys these are.
        num_queries, num_keys: Rows of queries here and keys there.
        span: What each row sees; None where every row sees every key.
        pairs: Visible (query, key) pairs; 0 means that there is nothing to compute.
    """

    owner: int
    num_queries: int
    num_keys: int
    span: Span | None
    pairs: int

    @cached_property
    def seen_by(self) -> Span | None:
        """For each key the rows that see it; None where all do."""
        if self.span is None:
            return None
        return Span(*transposed(self.span.first, self.span.stop, self.num_keys))

    @property
    def kind(self) -> str:
        """ "all", "none" or "span"."""
        if not self.pairs:
            return "none"
        return "all" if self.span is None else "span"

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """The step as legal calls of a library."""
        return tuple(_tiles(self))


@dataclass(frozen=True, eq=False)
class Plan:
    """The steps of one ring rank.

    Attributes:
        steps: In the order in which blocks arrive: owner r, r-1, r-2, ... The tail that no rank
            of the ring needs is cut off, on all ranks alike.
        queries: This rank's row of queries.
        keys: Every owner's row of keys.
    """

    ring_rank: int
    ring_degree: int
    steps: tuple[Step, ...]
    queries: Positions
    keys: tuple[Positions, ...]

    @property
    def hops(self) -> int:
        """How often a block is passed on."""
        return len(self.steps) - 1

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of this rank: its work."""
        return sum(step.pairs for step in self.steps)


class Reach(NamedTuple):
    """Positions ``[first, stop)`` that each row of queries sees, and the segments they lie in."""

    first: Tensor
    stop: Tensor
    first_segment: Tensor | None
    stop_segment: Tensor | None


@lru_cache(maxsize=32)
def make_plan(
    mask: Mask, layout: Layout, query_len: int, key_len: int, ring_degree: int, ring_rank: int
) -> Plan:
    """The plan of one ring rank.

    Args:
        mask: Who sees whom, by global positions.
        layout: Which token is where, the same for queries and keys.
        query_len, key_len: Tokens of the whole sequences.
        ring_degree, ring_rank: Size of the ring and the place in it.
    """
    queries = rows(layout, query_len, ring_degree)
    keys = rows(layout, key_len, ring_degree)
    first, stop = mask.intervals(queries[ring_rank].tensor, key_len)
    reach = Reach(first, stop, keys[0].segment_of(first), keys[0].segment_of(stop))
    hops = _hops(mask, queries, keys, key_len)
    owners = [(ring_rank - t) % ring_degree for t in range(hops + 1)]
    steps = tuple(_step(owner, keys[owner], reach) for owner in owners)
    return Plan(ring_rank, ring_degree, steps, queries[ring_rank], keys)


def _hops(
    mask: Mask, queries: tuple[Positions, ...], keys: tuple[Positions, ...], key_len: int
) -> int:
    """Hops after which no rank of the ring can need another block, the same on every rank.

    Judged by the ends of the rows alone, so it may keep a hop that nobody needs, never drop one.
    """
    degree = len(queries)
    reach = [mask.intervals(row.ends, key_len) for row in queries]

    def may_see(ring_rank: int, owner: int) -> bool:
        (first, stop), owned = reach[ring_rank], keys[owner].ends
        if not len(first) or not len(owned):
            return False
        return bool(first[0] <= owned[-1]) and bool(stop[-1] > owned[0])

    for hops in range(degree - 1, 0, -1):
        if any(may_see(r, (r - hops) % degree) for r in range(degree)):
            return hops
    return 0


def _step(owner: int, keys: Positions, reach: Reach) -> Step:
    first, stop = reach.first, reach.stop
    num_queries, num_keys = len(first), len(keys)
    if not num_queries or not num_keys:
        return Step(owner, num_queries, num_keys, None, 0)
    lowest, highest = keys.ends
    if stop[-1] <= lowest or first[0] > highest:
        return Step(owner, num_queries, num_keys, None, 0)
    if first[-1] <= lowest and stop[0] > highest:
        return Step(owner, num_queries, num_keys, None, num_queries * num_keys)
    span = Span(
        keys.count_below(first, reach.first_segment), keys.count_below(stop, reach.stop_segment)
    )
    return Step(owner, num_queries, num_keys, span if span.pairs else None, span.pairs)


@dataclass(frozen=True)
class Tile:
    """A rectangle of scores with at most a diagonal band, one legal call of a library.

    Rows ``[q0, q1)``, keys ``[k0, k1)``; with i and j counted from the rectangle's corner a row
    sees ``lo <= j - i <= hi``, None is no bound. Every row of a tile sees at least one key.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    lo: int | None = None
    hi: int | None = None


def _tiles(step: Step) -> Iterator[Tile]:
    """Cut a step into tiles: maximal runs of rows along which each end stays or moves by one."""
    if not step.pairs:
        return
    if step.span is None:
        yield Tile(0, step.num_queries, 0, step.num_keys)
        return
    seeing = (step.span.stop > step.span.first).nonzero().flatten()
    first, stop = step.span.first[seeing], step.span.stop[seeing]
    start = 0
    for end in _run_ends(seeing.diff(), first.diff(), stop.diff()):
        yield _tile(int(seeing[start]), first[start:end], stop[start:end])
        start = end


def _run_ends(rows_apart: Tensor, first_moves: Tensor, stop_moves: Tensor) -> list[int]:
    """Where runs of neighbouring rows with the same moves, 0 or 1 of each end, stop."""
    legal = (rows_apart == 1) & (first_moves <= 1) & (stop_moves <= 1)
    moves = torch.where(legal, first_moves * 2 + stop_moves, -1).tolist()
    ends, run = [], None
    for row, move in enumerate(moves):
        # The first row of a run takes any legal move; the run goes on while it repeats.
        if move < 0 or (run is not None and move != run):
            ends.append(row + 1)
            run = None
        else:
            run = move
    return [*ends, len(moves) + 1]


def _tile(q0: int, first: Tensor, stop: Tensor) -> Tile:
    k0, k1 = int(first[0]), int(stop[-1])
    lo = 0 if first[-1] > first[0] else None
    hi = int(stop[0]) - k0 - 1 if stop[-1] > stop[0] else None
    return Tile(q0, q0 + len(first), k0, k1, lo, hi)
