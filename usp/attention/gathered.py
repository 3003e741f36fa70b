"""The executor where queries move and keys stay: partial results are merged where they belong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from usp.attention import block
from usp.attention.given import Tensors
from usp.attention.ring import samples_heads, saved_of
from usp.backends import Backend, max_bands
from usp.distributed.comm import Axis
from usp.distributed.parcel import Parcel, sent
from usp.ops.merge import merge_into
from usp.planning.gathered import QueryPlan
from usp.planning.heads import Heads
from usp.planning.plan import Load
from usp.planning.problem import Block, Gradients, Saved, Scoring, state_dtype


@dataclass(frozen=True, eq=False)
class Gathered:
    """Who computes what with whom; as ``Ring``.

    Attributes:
        axis: The ring.
        plan: What this rank computes.
        heads, scoring, backend: As in ``Ring``.
    """

    axis: Axis
    plan: QueryPlan
    heads: Heads
    scoring: Scoring
    backend: Backend


def gathered_forward(inputs: Tensors, call: Gathered) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the keys of all ranks.

    Args:
        inputs: After the head exchange; without an additive bias.

    Returns:
        out: (B, Lq, H, Dv), dtype of q. lse: (B, H, Lq) in the dtype of the state.
    """
    plan, q = call.plan, inputs.q
    value_dim = inputs.v.shape[-1]
    queries = _sent_to_readers(call, {rank: [q] for rank in plan.owners}, [q])
    found: dict[int, list[Tensor]] = {}
    for rank, (theirs,) in {**queries, plan.ring_rank: [q]}.items():
        out, lse = _partial(inputs, theirs, rank, call, value_dim)
        found[rank] = [out, lse]
    out, lse = found.pop(plan.ring_rank)
    parcel = Parcel.of([out, lse])
    came = sent(call.axis, found, dict.fromkeys(plan.owners, parcel), q.device)
    for owner in sorted(came):  # in rank order: the same bits every time
        merge_into(out, lse, *came[owner])
    return out.to(q.dtype), lse


def gathered_backward(
    inputs: Tensors, saved: Saved, call: Gathered, kv_dtype: torch.dtype
) -> Gradients:
    """Gradients of this rank's q, k and v; arguments as in ``ring_backward``."""
    plan, q, dtype = call.plan, inputs.q, saved.lse.dtype
    moved = [q, saved.dout, saved.out, saved.lse, saved.delta]
    theirs = _sent_to_readers(call, dict.fromkeys(plan.owners, moved), moved)
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (inputs.k, inputs.v))
    found: dict[int, list[Tensor]] = {}
    for rank, (q_there, dout, out, lse, delta) in {**theirs, plan.ring_rank: moved}.items():
        dq = torch.zeros(q_there.shape, dtype=dtype, device=q.device)
        there = Saved(dout, out, lse, delta, saved.lse_has_gradient)
        for load, piece in _pieces(inputs, q_there, rank, call):
            samples = load.samples
            grads = Gradients(samples.of(dq), samples.of(dk), samples.of(dv))
            block.attention_backward(piece, saved_of(there, samples), grads, call.backend)
        found[rank] = [dq]
    (total,) = found.pop(plan.ring_rank)
    came = sent(call.axis, found, dict.fromkeys(plan.owners, Parcel.of([total])), q.device)
    for owner in sorted(came):
        total += came[owner][0]
    return Gradients(total.to(q.dtype), dk.to(kv_dtype), dv.to(kv_dtype))


def _partial(
    inputs: Tensors, q: Tensor, rank: int, call: Gathered, value_dim: int
) -> tuple[Tensor, Tensor]:
    """What a rank's queries see of the keys here, in the dtype of the state."""
    state = block.new_state(q, value_dim)
    assert state.out is not None
    for load, piece in _pieces(inputs, q, rank, call):
        samples = load.samples
        part = replace(state, out=samples.of(state.out), lse=samples.of(state.lse))
        block.attention_forward(piece, part, call.backend)
    return state.out, state.lse


def _pieces(inputs: Tensors, q: Tensor, rank: int, call: Gathered) -> Iterator[tuple[Load, Block]]:
    """The kernel's calls for a rank's queries and the keys here."""
    plan, dtype = call.plan, state_dtype(q.dtype)
    if not q.numel():
        return
    for load in plan.loads[rank]:
        samples, heads, slopes, bias = load.samples, call.heads, inputs.alibi_slopes, None
        q_pos = k_pos = None
        if slopes is not None or call.scoring.dropout_p:
            q_pos = (plan.queries[rank].on(q.device) + load.query_offset).int()
            k_pos = plan.keys.on(q.device).int()
        if call.scoring.dropout_p:
            heads = samples_heads(heads, samples)
        if inputs.key_padding_mask is not None:
            mask = samples.of(inputs.key_padding_mask)
            hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            bias = hidden.masked_fill_(mask, -torch.inf)[:, None, None]
        slopes = None if slopes is None else samples.of(slopes)
        tensors = samples.of(q), samples.of(inputs.k), samples.of(inputs.v)
        for visit in load.calls(max_bands(call.backend, q.device)):
            yield load, Block(*tensors, visit, heads, call.scoring, bias, slopes, q_pos, k_pos)


def _sent_to_readers(
    call: Gathered, messages: Mapping[int, Sequence[Tensor]], like: Sequence[Tensor]
) -> dict[int, list[Tensor]]:
    """This rank's tensors to the owners of keys that its queries see; those of others come."""
    parcels = {}
    for rank in call.plan.readers:
        length = len(call.plan.queries[rank])
        shapes = tuple(_with_queries(x, length) for x in like)
        parcels[rank] = Parcel(shapes, tuple(x.dtype for x in like))
    return sent(call.axis, messages, parcels, like[0].device)


def _with_queries(x: Tensor, length: int) -> tuple[int, ...]:
    """The shape for another number of queries: dim 1 of (B, Lq, H, D), the last of (B, H, Lq)."""
    if x.dim() == 4:
        return (x.shape[0], length, *x.shape[2:])
    return (*x.shape[:2], length)
