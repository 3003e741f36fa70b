"""The one ring executor, forward and backward, for every layout, mask, transport and backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from usp.attention import block, levels
from usp.attention.arguments import Tensors
from usp.backends import Backend
from usp.distributed.comm import Axis
from usp.distributed.parcel import Parcel
from usp.distributed.transport import Transport, make_transport
from usp.planning.heads import Heads
from usp.planning.plan import Plan, Step
from usp.planning.problem import Block, Gradients, Saved, Scoring, state_dtype


@dataclass(frozen=True, eq=False)
class Ring:
    """Who computes what with whom.

    Attributes:
        axis: The ring.
        plan: The steps of this rank.
        transport: "ring" or "allgather".
        heads: The query heads held here, the same on the whole ring.
        scoring: How scores are made.
        backend: Whose kernels.
    """

    axis: Axis
    plan: Plan
    transport: str
    heads: Heads
    scoring: Scoring
    backend: Backend


def ring_forward(
    inputs: Tensors, ring: Ring, large_bias: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention of this rank's queries over the keys of all ranks of the ring.

    Args:
        inputs: After the head exchange.
        ring: Who computes what with whom.
        large_bias: Whether the bias has values that need levels.

    Returns:
        out: (B, Lq, H, Dv), dtype of q. lse: (B, H, Lq) fp32 (fp64 for fp64 inputs), -inf for rows
        that see nothing. level: (B|1, H|1, Lq), what lse is relative to, or None.

    Source:
        Ring attention: arXiv:2310.01889.
    """
    q, steps = inputs.q, ring.plan.steps
    working = [t for t, step in enumerate(steps) if step.pairs and q.numel()]
    state = block.new_state(q, inputs.v.shape[-1], carried=len(working) > 1 or large_bias)
    level = None
    empty = q.new_empty if working else q.new_zeros
    out = empty((*q.shape[:3], inputs.v.shape[-1]))
    transport = _transport(inputs.travelling, ring)
    for t, held in enumerate(transport.blocks(inputs.travelling)):
        if t not in working:
            continue
        parts = [_block(inputs, held, steps[t], ring)]
        if large_bias:
            level = levels.new_level(parts[0]) if level is None else level
            parts = levels.enter(parts[0], level, state.lse)
        for part in parts:
            if t == working[-1] and part is parts[-1]:
                state = replace(state, result=out)
            block.attention_forward(part, state, ring.backend)
    return out, state.lse, level


def ring_backward(
    inputs: Tensors,
    saved: Saved,
    ring: Ring,
    bias_gradient: bool,
    kv_dtype: torch.dtype,
    level: Tensor | None = None,
) -> Gradients:
    """Gradients of this rank's q, k, v and bias; dk and dv travel one hop behind their block.

    Args:
        inputs: As in the forward.
        saved: The forward's results and their gradients.
        ring: As in the forward.
        bias_gradient: Whether to compute that of the bias, in its shape.
        kv_dtype: Of the resulting dk and dv: that of q or of the state.
        level: What the saved lse is relative to, or None.

    Returns:
        dq in the dtype of q; dbias in that of the state.
    """
    dtype, device = saved.lse.dtype, inputs.q.device
    # nothing to sum: a kernel writes the final gradients
    only = not ring.plan.hops and level is None
    dq_dtype, sum_dtype = (inputs.q.dtype, kv_dtype) if only else (dtype, dtype)
    dq = torch.empty(inputs.q.shape, dtype=dq_dtype, device=device)
    if not only:
        dq.zero_()
    dbias = None
    if bias_gradient:
        assert inputs.attn_bias is not None
        dbias = torch.zeros(inputs.attn_bias.shape, dtype=dtype, device=device)
    transport = _transport(inputs.travelling, ring)
    sums = transport.sums(_parcels([inputs.k, inputs.v], ring, sum_dtype), device)
    for step, held in zip(ring.plan.steps, transport.blocks(inputs.travelling), strict=True):
        dk, dv = sums.fresh(step.owner)
        if not ring.plan.hops and not only:
            dk.zero_(), dv.zero_()
        if step.pairs and inputs.q.numel():
            piece = _block(inputs, held, step, ring)
            step_dbias = None
            if dbias is not None:
                assert piece.bias is not None
                step_dbias = torch.zeros(piece.bias.shape, dtype=dtype, device=device)
            grads = Gradients(dq, dk, dv, step_dbias, only)
            for part in [piece] if level is None else levels.relative(piece, level):
                block.attention_backward(part, saved, grads, ring.backend)
            if dbias is not None and step_dbias is not None:
                _add_columns(dbias, step_dbias, ring.plan, step)
        elif only:
            for gradient in (dq, dk, dv):
                gradient.zero_()
        sums.pass_on()
    dk, dv = sums.home()
    return Gradients(dq.to(inputs.q.dtype), dk.to(kv_dtype), dv.to(kv_dtype), dbias)


def _transport(tensors: Sequence[Tensor], ring: Ring) -> Transport:
    parcels = _parcels(tensors, ring) if ring.plan.hops else []
    return make_transport(ring.transport, ring.axis, ring.plan.hops, parcels)


def _parcels(
    tensors: Sequence[Tensor], ring: Ring, dtype: torch.dtype | None = None
) -> list[Parcel]:
    """The block of each owner: these tensors with that owner's number of keys."""
    dtypes = tuple(dtype or t.dtype for t in tensors)
    return [
        Parcel(tuple((t.shape[0], len(row), *t.shape[2:]) for t in tensors), dtypes)
        for row in ring.plan.keys
    ]


def _block(inputs: Tensors, held: Sequence[Tensor], step: Step, ring: Ring) -> Block:
    """The kernel's view of one step."""
    k, v, *mask = held
    q_pos = k_pos = None
    if inputs.alibi_slopes is not None or ring.scoring.dropout_p:
        q_pos = ring.plan.queries.on(inputs.q.device).int()
        k_pos = ring.plan.keys[step.owner].on(inputs.q.device).int()
    return Block(
        inputs.q,
        k,
        v,
        step,
        ring.heads,
        ring.scoring,
        _step_bias(inputs, mask[0] if mask else None, step, ring.plan),
        inputs.alibi_slopes,
        q_pos,
        k_pos,
    )


def _step_bias(inputs: Tensors, mask: Tensor | None, step: Step, plan: Plan) -> Tensor | None:
    """The bias of one owner's keys, in the dtype of the state; hidden keys get -inf."""
    dtype, bias = state_dtype(inputs.q.dtype), None
    if inputs.attn_bias is not None:
        bias = inputs.attn_bias
        if plan.ring_degree > 1:
            bias = bias.index_select(3, plan.keys[step.owner].on(bias.device))
        bias = bias.to(dtype)
    if mask is not None:
        hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        hidden = hidden.masked_fill_(mask, -torch.inf)[:, None, None]
        bias = hidden if bias is None else bias + hidden
    return bias


def _add_columns(dbias: Tensor, step_dbias: Tensor, plan: Plan, step: Step) -> None:
    """Add the columns of one owner's keys, summed over the dims the bias is broadcast along."""
    columns = plan.keys[step.owner].on(dbias.device)
    step_dbias = step_dbias.sum_to_size((*dbias.shape[:3], step_dbias.shape[3]))
    dbias.index_add_(3, columns, step_dbias)
