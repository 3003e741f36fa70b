"""The executor where queries travel: those of some ranks against keys that stay, or travel too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from usp.attention import block
from usp.attention.given import Tensors
from usp.attention.ring import Call, Ring, calls, own_parts, saved_of
from usp.backends import Backend, max_bands
from usp.distributed.comm import Axis
from usp.distributed.double_ring import transport_along
from usp.distributed.parcel import Parcel, sent
from usp.distributed.transport import Parts, Transport
from usp.ops.delta import with_products
from usp.ops.merge import merge_into
from usp.planning.grid import Grid
from usp.planning.problem import Gradients, Saved, State
from usp.planning.route import Cargo, Exchange
from usp.planning.rows import Rows
from usp.planning.samples import Samples


@dataclass(frozen=True, eq=False)
class GridRing(Ring):
    """A ring of keys, of one block where these stay, for queries that come.

    Attributes:
        plan: That of the own queries.
        grid: Whose queries come.
        query_axis, query_levels: What they come along, as ``axis`` and ``levels`` of keys.
    """

    grid: Grid | None = None
    query_axis: Axis | None = None
    query_levels: tuple[Axis, Axis] | None = None

    @property
    def queries(self) -> tuple[Axis, Grid, Transport]:
        assert self.query_axis is not None and self.grid is not None
        along = transport_along(self.query_axis, self.grid.query_route, self.query_levels)
        return self.query_axis, self.grid, along

    @property
    def samples(self) -> list[Samples]:
        """Of each part of the batch."""
        return [load.samples for load in self.plan.steps[0].loads]

    def tiles(self, inputs: Tensors, own: Sequence[Tensor]) -> Iterator[_Tile]:
        """Each pair of a block of keys and one of queries, keys by keys.

        Args:
            inputs: Of this rank.
            own: What travels of its queries, first the queries.
        """
        _, grid, transport = self.queries
        coming, kept = transport.blocks(own_parts(own, self)), list[Parts]()
        last = len(self.plan.steps) - 1
        for step, keys in enumerate(self.transport.blocks(own_parts(inputs.travelling, self))):
            for at, plan in enumerate(grid.plans):
                queries = kept[at] if step else next(coming)
                if last and not step:  # queries that pass by are held for no second block
                    kept.append(queries)
                yield _Tile(step, at, step == last, queries, keys, replace(self, plan=plan))
            if not step:
                assert next(coming, None) is None


class _Tile(NamedTuple):
    """Queries of one rank against keys of another.

    Attributes:
        step, at: Which block of keys, and which of queries.
        is_last: Whether it is the last block of keys.
        queries: What came of the queries, by parts of the batch. keys: Of the keys.
        ring: With the plan of these queries.
    """

    step: int
    at: int
    is_last: bool
    queries: Parts
    keys: Parts
    ring: Ring

    def calls(self, inputs: Tensors) -> Iterator[Call]:
        """The kernel's view of it."""
        ring, own = self.ring, [part[0] for part in self.queries]
        most = max_bands(ring.backend, inputs.q.device)
        return calls(inputs, ring.plan.steps[self.step], self.keys, ring, most, own)


def grid_forward(inputs: Tensors, ring: GridRing) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries; as ``ring_forward``, without an additive bias.

    What is found for queries of others is merged where they belong; they come by direct messages.

    Source:
        Mesh-Attention: arXiv:2512.20968.
    """
    state, width = block.new_state(inputs.q, inputs.v.shape[-1]), inputs.v.shape[-1]
    assert state.out is not None
    own = [State(each.of(state.out), each.of(state.lse)) for each in ring.samples]
    states: list[list[State]] = []
    for tile in ring.tiles(inputs, [inputs.q]):
        if tile.at == len(states):
            theirs = [block.new_state(q, width) for (q,) in tile.queries] if tile.at else own
            states.append(theirs)
        for part, _, piece in tile.calls(inputs):
            block.attention_forward(piece, states[tile.at][part], ring.backend)
    axis, grid, _ = ring.queries
    if isinstance(grid.query_route, Exchange):
        _merge_home(own, states[1:], grid.query_route, axis)
    return state.out.to(inputs.q.dtype), state.lse


def grid_backward(
    inputs: Tensors, saved: Saved, ring: GridRing, kv_dtype: torch.dtype
) -> Gradients:
    """Gradients of this rank's q, k and v: each behind the block that it belongs to.

    Arguments as in ``ring_backward``; there is no additive bias.
    """
    dtype = saved.lse.dtype
    dq, dk, dv = (
        torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (inputs.q, inputs.k, inputs.v)
    )
    (_, grid, transport), gradients = ring.queries, own_parts([dk, dv], ring)
    own, own_keys = own_parts([dq], ring), gradients
    query_sums, key_sums = transport.sums(own), ring.transport.sums(own_keys)
    moved = inputs.q, saved.dout, saved.lse.transpose(1, 2), saved.delta.transpose(1, 2)
    at_home = [saved_of(saved, samples) for samples in ring.samples]
    kept: dict[int, tuple[list[Saved], Parts]] = {}
    for tile in ring.tiles(inputs, moved):
        if tile.step and not tile.at:
            gradients = key_sums.fresh()
        if not tile.step:
            there = [_saved_there(part, saved, ring.backend) for part in tile.queries]
            kept[tile.at] = (there, query_sums.fresh()) if tile.at else (at_home, own)
        there, sums = kept.pop(tile.at) if tile.is_last else kept[tile.at]
        for part, _, piece in tile.calls(inputs):
            (dq_here,), (dk_here, dv_here) = sums[part], gradients[part]
            grads = Gradients(dq_here, dk_here, dv_here)
            block.attention_backward(piece, there[part], grads, ring.backend)
        if tile.is_last and tile.at:
            query_sums.pass_on()
        if tile.step and tile.at == len(grid.plans) - 1:
            key_sums.pass_on()
    key_sums.home(own_keys)
    query_sums.home(own)
    return Gradients(dq.to(inputs.q.dtype), dk.to(kv_dtype), dv.to(kv_dtype))


def _saved_there(came: Sequence[Tensor], at_home: Saved, backend: Backend) -> Saved:
    """What came of queries, as kernels take it.

    Libraries make delta of ``out``, which has not come: they are given another one with the same
    products, so that nobody needs to know which kernels others have.
    """
    _, dout, *rest = came
    lse, delta = (x.transpose(1, 2).contiguous() for x in rest)
    out = dout if backend.CARRIES_STATE else with_products(dout, delta)
    return Saved(dout, out, lse, delta, at_home.lse_has_gradient)


def _merge_home(
    own: Sequence[State], found: Sequence[Sequence[State]], route: Exchange, axis: Axis
) -> None:
    """Send what was found for the queries of others, and merge what they found for these.

    Args:
        own: Of each part of the batch, in place.
        found: For each arrival of the route, of each part.
    """
    owners = [arrival.owner for arrival in route.arrivals]
    parcels = {
        rank: _parcel(own, cargo) for rank, cargo in enumerate(route.sent_to) if rank != axis.rank
    }
    given = [
        [x for state in states for x in (state.out, state.lse) if x is not None] for states in found
    ]
    came = sent(axis, dict(zip(owners, given, strict=True)), parcels, own[0].lse.device)
    for rank in sorted(came):  # in rank order: the same bits every time
        tensors = came[rank]
        for i, (state, rows) in enumerate(zip(own, route.sent_to[rank], strict=True)):
            _merge_rows(state, rows, tensors[2 * i], tensors[2 * i + 1])


def _parcel(states: Sequence[State], cargo: Cargo) -> Parcel:
    shapes, dtypes = [], []
    for state, rows in zip(states, cargo, strict=True):
        assert state.out is not None
        batch, _, heads, width = state.out.shape
        shapes += [(batch, len(rows), heads, width), (batch, heads, len(rows))]
        dtypes += [state.out.dtype, state.lse.dtype]
    return Parcel(tuple(shapes), tuple(dtypes))


def _merge_rows(state: State, rows: Rows, out: Tensor, lse: Tensor) -> None:
    assert state.out is not None
    if not len(rows):
        return
    if len(rows.start) == 1:
        run = slice(int(rows.start[0]), int(rows.stop[0]))
        merge_into(state.out[:, run], state.lse[:, :, run], out, lse)
        return
    index = rows.on(out.device)
    here, level = state.out.index_select(1, index), state.lse.index_select(2, index)
    merge_into(here, level, out, lse)
    state.out.index_copy_(1, index, here)
    state.lse.index_copy_(2, index, level)
