"""The executor on a grid of ranks: a node's queries against keys of a place; both move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from usp.attention import block
from usp.attention.gathered import merge_home
from usp.attention.given import Tensors
from usp.attention.query_ring import saved_there
from usp.attention.ring import Ring, calls, own_parts, saved_of
from usp.backends import max_bands
from usp.distributed.comm import Axis
from usp.distributed.transport import Parts, Transport, make_transport
from usp.planning.grid import Grid
from usp.planning.problem import Gradients, Saved, State
from usp.planning.route import Exchange
from usp.planning.samples import Samples


@dataclass(frozen=True, eq=False)
class GridRing(Ring):
    """A ring of keys along the outer axis, for the queries of a node.

    Attributes:
        grid: Whose queries come along ``inner``.
    """

    inner: Axis | None = None
    grid: Grid | None = None

    @property
    def queries(self) -> tuple[Axis, Grid, Transport]:
        assert self.inner is not None and self.grid is not None
        return self.inner, self.grid, make_transport(self.inner, self.grid.query_route)

    def tiles(self, inputs: Tensors, own: list[Tensor]) -> Iterator[_Tile]:
        """Each pair of a block of keys and one of queries, keys by keys.

        Args:
            inputs: Of this rank.
            own: What travels of its queries, first the queries.
        """
        _, grid, transport = self.queries
        coming, kept = transport.blocks([own]), cast("list[list[Tensor]]", [])
        travelling = own_parts(inputs.travelling, self)
        for index, keys in enumerate(self.transport.blocks(travelling)):
            for at, plan in enumerate(grid.plans):
                if not index:
                    kept.append(next(coming)[0])
                yield _Tile(index, at, kept[at], keys, replace(self, plan=plan))
            if not index:
                assert next(coming, None) is None


@dataclass(frozen=True, eq=False)
class _Tile:
    """Queries of one rank against keys of another.

    Attributes:
        step, at: Which block of keys, and which of queries.
        rows: What came of the queries. keys: Of the keys, by parts of the batch.
        ring: With the plan of these queries.
    """

    step: int
    at: int
    rows: list[Tensor]
    keys: Parts
    ring: Ring


def grid_forward(inputs: Tensors, ring: GridRing) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries; as ``ring_forward``, without an additive bias.

    Source:
        Mesh-Attention: arXiv:2512.20968.
    """
    states: list[State] = []
    most = max_bands(ring.backend, inputs.q.device)
    for tile in ring.tiles(inputs, [inputs.q]):
        if tile.at == len(states):
            states.append(block.new_state(tile.rows[0], inputs.v.shape[-1]))
        state, here = states[tile.at], inputs._replace(q=tile.rows[0])
        assert state.out is not None
        step = tile.ring.plan.steps[tile.step]
        for _, samples, piece in calls(here, step, tile.keys, tile.ring, most):
            part = State(samples.of(state.out), samples.of(state.lse))
            block.attention_forward(piece, part, ring.backend)
    (own, *others), (axis, grid, _) = states, ring.queries
    assert own.out is not None
    if isinstance(grid.query_route, Exchange):
        found = [[state.out, state.lse] for state in others if state.out is not None]
        merge_home(own.out, own.lse, [Samples()], found, grid.query_route, axis)
    return own.out.to(inputs.q.dtype), own.lse


def grid_backward(
    inputs: Tensors, saved: Saved, ring: GridRing, kv_dtype: torch.dtype
) -> Gradients:
    """Gradients of this rank's q, k and v: dK and dV behind their block, dq home at the end."""
    dtype = saved.lse.dtype
    dq, dk, dv = (
        torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (inputs.q, inputs.k, inputs.v)
    )
    _, _, transport = ring.queries
    query_sums, own = transport.sums([[dq]]), own_parts([dk, dv], ring)
    key_sums = ring.transport.sums(own)
    moved = [inputs.q, saved.dout, saved.lse.transpose(1, 2), saved.delta.transpose(1, 2)]
    most, there = max_bands(ring.backend, inputs.q.device), 0
    sums: list[Tensor] = []
    at_home: list[Saved] = []
    gradients = own
    for tile in ring.tiles(inputs, moved):
        if tile.step != there:
            if there:
                key_sums.pass_on()
            there, gradients = tile.step, key_sums.fresh()
        if tile.at == len(sums):
            sums.append(query_sums.fresh()[0][0] if tile.at else dq)
            _, dout, lse, delta = tile.rows
            arrived = saved_there(dout, lse, delta, saved.lse_has_gradient, ring.backend)
            at_home.append(arrived if tile.at else saved)
        step, here = tile.ring.plan.steps[tile.step], inputs._replace(q=tile.rows[0])
        for part, samples, piece in calls(here, step, tile.keys, tile.ring, most):
            dk_here, dv_here = gradients[part]
            grads = Gradients(samples.of(sums[tile.at]), dk_here, dv_here)
            of_rows = saved_of(at_home[tile.at], samples)
            block.attention_backward(piece, of_rows, grads, ring.backend)
    if there:
        key_sums.pass_on()
    key_sums.home(own)
    query_sums.home([[dq]])
    return Gradients(dq.to(inputs.q.dtype), dk.to(kv_dtype), dv.to(kv_dtype))
