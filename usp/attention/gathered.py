"""The forward where queries move and keys stay: partial results are merged where they belong."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from usp.attention import block
from usp.attention.given import Tensors
from usp.attention.query_ring import QueryRing, pieces
from usp.distributed.comm import Axis
from usp.distributed.double_ring import transport_along
from usp.distributed.parcel import Parcel, sent
from usp.ops.merge import merge_into
from usp.planning.problem import State
from usp.planning.route import Cargo, Exchange
from usp.planning.rows import Rows
from usp.planning.samples import Samples


def gathered_forward(inputs: Tensors, ring: QueryRing) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the keys of all ranks.

    Args:
        inputs: After the head exchange; without an additive bias.
        ring: Its route is direct.

    Returns:
        out: (B, Lq, H, Dv), dtype of q. lse: (B, H, Lq) in the dtype of the state.
    """
    q, steps, route = inputs.q, ring.plan.steps, ring.plan.route
    own = [[load.samples.of(q)] for load in steps[0].loads]
    state, found = block.new_state(q, inputs.v.shape[-1]), []
    assert state.out is not None
    blocks = transport_along(ring.axis, route).blocks(own)
    for step, held in zip(steps, blocks, strict=True):
        partial: list[Tensor] = []
        for load, (theirs,) in zip(step.loads, held, strict=True):
            here = block.new_state(theirs, inputs.v.shape[-1])
            if step is steps[0]:
                here = State(load.samples.of(state.out), load.samples.of(state.lse))
            for piece in pieces(inputs, theirs, ring.plan.queries[step.owner], load, ring):
                block.attention_forward(piece, here, ring.backend)
            assert here.out is not None
            partial += [here.out, here.lse]
        found.append(partial)
    if isinstance(route, Exchange):
        samples = [load.samples for load in steps[0].loads]
        merge_home(state.out, state.lse, samples, found[1:], route, ring.axis)
    return state.out.to(q.dtype), state.lse


def merge_home(
    out: Tensor,
    lse: Tensor,
    parts: Sequence[Samples],
    found: list[list[Tensor]],
    route: Exchange,
    axis: Axis,
) -> None:
    """Send what was found for the queries of others, and merge what they found for these.

    Args:
        out, lse: Of the own queries, in place.
        parts: Of the batch.
        found: For each arrival of the route, out and lse of each part.
    """
    owners = [arrival.owner for arrival in route.arrivals]
    states = [State(samples.of(out), samples.of(lse)) for samples in parts]
    parcels = {
        rank: _parcel(states, cargo)
        for rank, cargo in enumerate(route.sent_to)
        if rank != axis.rank
    }
    came = sent(axis, dict(zip(owners, found, strict=True)), parcels, out.device)
    for rank in sorted(came):  # in rank order: the same bits every time
        tensors = came[rank]
        for i, (state, rows) in enumerate(zip(states, route.sent_to[rank], strict=True)):
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
