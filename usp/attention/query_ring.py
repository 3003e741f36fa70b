"""The backward where queries travel and keys stay: the ring's loop with the roles changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from usp.attention import block
from usp.attention.given import Tensors
from usp.attention.ring import samples_heads, saved_of
from usp.backends import Backend, max_bands
from usp.distributed.comm import Axis
from usp.distributed.double_ring import transport_along
from usp.ops.delta import with_products
from usp.planning.heads import Heads
from usp.planning.layout import Positions
from usp.planning.plan import Load
from usp.planning.problem import Block, Gradients, Saved, Scoring, state_dtype
from usp.planning.query_ring import QuerySteps


@dataclass(frozen=True, eq=False)
class QueryRing:
    """Who computes what with whom; as ``Ring``."""

    axis: Axis
    plan: QuerySteps
    heads: Heads
    scoring: Scoring
    backend: Backend
    levels: tuple[Axis, Axis] | None = None


def query_ring_backward(
    inputs: Tensors, saved: Saved, ring: QueryRing, kv_dtype: torch.dtype
) -> Gradients:
    """Gradients of this rank's q, k and v; dq travels one hop behind its queries.

    Arguments as in ``ring_backward``; there is no additive bias.
    """
    dtype, steps = saved.lse.dtype, ring.plan.steps
    dq, dk, dv = (
        torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (inputs.q, inputs.k, inputs.v)
    )
    travelling = inputs.q, saved.dout, saved.lse.transpose(1, 2), saved.delta.transpose(1, 2)
    own = [[load.samples.of(x) for x in travelling] for load in steps[0].loads]
    totals = [[load.samples.of(dq)] for load in steps[0].loads]
    transport = transport_along(ring.axis, ring.plan.route, ring.levels)
    sums = transport.sums(totals)
    for step, held in zip(steps, transport.blocks(own), strict=True):
        is_own = step is steps[0]
        gradients = totals if is_own else sums.fresh()
        for load, (q, dout, lse, delta), (dq_here,) in zip(
            step.loads, held, gradients, strict=True
        ):
            there = saved_of(saved, load.samples)
            if not is_own:
                there = saved_there(dout, lse, delta, saved.lse_has_gradient, ring.backend)
            grads = Gradients(dq_here, load.samples.of(dk), load.samples.of(dv))
            for piece in pieces(inputs, q, ring.plan.queries[step.owner], load, ring):
                block.attention_backward(piece, there, grads, ring.backend)
        if not is_own:
            sums.pass_on()
    sums.home(totals)
    return Gradients(dq.to(inputs.q.dtype), dk.to(kv_dtype), dv.to(kv_dtype))


def saved_there(
    dout: Tensor, lse: Tensor, delta: Tensor, has_dlse: bool, backend: Backend
) -> Saved:
    """What came, as kernels take it.

    Libraries make delta of ``out``, which has not come: they are given another one with the same
    products, so that nobody needs to know which kernels others have.
    """
    lse, delta = (x.transpose(1, 2).contiguous() for x in (lse, delta))
    out = dout if backend.CARRIES_STATE else with_products(dout, delta)
    return Saved(dout, out, lse, delta, has_dlse)


def pieces(
    inputs: Tensors, q: Tensor, row: Positions, load: Load, ring: QueryRing
) -> Iterator[Block]:
    """The kernel's calls for some queries of a row and all keys here."""
    if load.seen is None or not q.numel():
        return
    samples, heads, slopes, bias = load.samples, ring.heads, inputs.alibi_slopes, None
    q_pos = k_pos = None
    if slopes is not None or ring.scoring.dropout_p:
        positions = row.on(q.device)
        if not load.rows.are_all:
            positions = positions.index_select(0, load.rows.on(q.device))
        q_pos = (positions + load.query_offset).int()
        k_pos = ring.plan.keys.on(q.device).int()
    if ring.scoring.dropout_p:
        heads = samples_heads(heads, samples)
    if inputs.key_padding_mask is not None:
        mask = samples.of(inputs.key_padding_mask)
        hidden = torch.zeros(mask.shape, dtype=state_dtype(q.dtype), device=mask.device)
        bias = hidden.masked_fill_(mask, -torch.inf)[:, None, None]
    slopes = None if slopes is None else samples.of(slopes)
    k, v = samples.of(inputs.k), samples.of(inputs.v)
    for visit in load.calls(max_bands(ring.backend, q.device)):
        yield Block(q, k, v, visit, heads, ring.scoring, bias, slopes, q_pos, k_pos)
