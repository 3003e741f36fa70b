"""The one ring executor, forward and backward, for every layout, mask, transport and backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from usp.attention import block, levels
from usp.attention.given import Tensors
from usp.backends import Backend, max_bands
from usp.distributed.comm import Axis
from usp.distributed.double_ring import transport_along
from usp.distributed.transport import Parts, Transport
from usp.planning.heads import Heads
from usp.planning.plan import Load, Plan, Step
from usp.planning.positions import Positions
from usp.planning.problem import Block, Gradients, Saved, Scoring, State, state_dtype
from usp.planning.rows import Rows
from usp.planning.samples import Samples


@dataclass(frozen=True, eq=False)
class Ring:
    """Who computes what with whom.

    Attributes:
        axis: The ring.
        plan: The steps of this rank.
        heads: The query heads held here, the same on the whole ring.
        scoring: How scores are made.
        backend: Whose kernels.
        levels: The outer and the inner axis of a double ring.
    """

    axis: Axis
    plan: Plan
    heads: Heads
    scoring: Scoring
    backend: Backend
    levels: tuple[Axis, Axis] | None = None

    @property
    def transport(self) -> Transport:
        """How blocks travel in one pass."""
        return transport_along(self.axis, self.plan.route, self.levels)


_CONTIGUOUS = torch.contiguous_format


class Call(NamedTuple):
    """One visit of a kernel.

    Attributes:
        part: Which part of the batch it is of, by number.
        samples: Which samples these are.
        block: What is computed; its bias is the one that was given.
    """

    part: int
    samples: Samples
    block: Block


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
    q, steps, value_dim = inputs.q, ring.plan.steps, inputs.v.shape[-1]
    most = _bands_at_once(inputs, ring, large_bias)
    left = [
        sum(len(step.loads[part].calls(most)) for step in steps) for part in range(_parts(ring))
    ]
    carried = max(left) > 1 or large_bias
    samples_of = [load.samples for load in steps[0].loads]
    states = [block.new_state(each.of(q), value_dim, carried=carried) for each in samples_of]
    level = _new_level(inputs, ring) if large_bias else None
    empty = q.new_empty if min(left) else q.new_zeros
    out = empty((*q.shape[:3], value_dim))
    travelling = own_parts(inputs.travelling, ring)
    for step, held in zip(steps, ring.transport.blocks(travelling), strict=True):
        for part, samples, piece in calls(inputs, step, held, ring, most):
            left[part] -= 1
            here, pieces = states[part], [piece]
            if level is not None:
                pieces = levels.enter(piece, samples.of(level), here.lse)
            for relative in pieces:
                if not left[part] and relative is pieces[-1]:
                    here = State(here.out, here.lse, samples.of(out))
                block.attention_forward(relative, here, ring.backend)
    return (
        out,
        torch.cat([state.lse for state in states]) if len(states) > 1 else states[0].lse,
        level,
    )


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
    dtype, plan = saved.lse.dtype, ring.plan
    # nothing to sum: a kernel writes the final gradients
    most = _bands_at_once(inputs, ring, level is not None)
    only = plan.route is None and level is None and _visited_once(plan.steps[0], inputs.q, most)
    dtypes = (inputs.q.dtype, kv_dtype, kv_dtype) if only else (dtype,) * 3
    make = torch.empty_like if only else torch.zeros_like
    dq, dk, dv = (
        make(x, dtype=sums, memory_format=_CONTIGUOUS)
        for x, sums in zip((inputs.q, inputs.k, inputs.v), dtypes, strict=True)
    )
    dbias = None
    if bias_gradient:
        assert inputs.attn_bias is not None
        dbias = torch.zeros(inputs.attn_bias.shape, dtype=dtype, device=dq.device)
    transport = ring.transport
    own = own_parts([dk, dv], ring)
    sums = transport.sums(own)
    blocks = transport.blocks(own_parts(inputs.travelling, ring))
    saved_by_part = [saved_of(saved, load.samples) for load in plan.steps[0].loads]
    for step, held in zip(plan.steps, blocks, strict=True):
        is_own = step is plan.steps[0]
        gradients = own if is_own else sums.fresh()
        for part, samples, piece in calls(inputs, step, held, ring, most):
            piece_dbias = None
            if dbias is not None and piece.bias is not None:
                piece_dbias = torch.zeros(piece.bias.shape, dtype=dtype, device=dq.device)
            dk_here, dv_here = gradients[part]
            grads = Gradients(samples.of(dq), dk_here, dv_here, piece_dbias, only)
            pieces = [piece] if level is None else levels.relative(piece, samples.of(level))
            for relative in pieces:
                block.attention_backward(relative, saved_by_part[part], grads, ring.backend)
            if dbias is not None and piece_dbias is not None:
                _add_columns(dbias, piece_dbias, step.owner, step.loads[part], plan)
        if not is_own:
            sums.pass_on()
    sums.home(own)
    return Gradients(dq.to(inputs.q.dtype), dk.to(kv_dtype), dv.to(kv_dtype), dbias)


def _parts(ring: Ring) -> int:
    return len(ring.plan.steps[0].loads)


def _bands_at_once(inputs: Tensors, ring: Ring, large_bias: bool) -> int:
    """How many bands of a mask a kernel is given together; levels are found band by band."""
    return 1 if large_bias else max_bands(ring.backend, inputs.q.device)


def _visited_once(step: Step, q: Tensor, bands: int) -> bool:
    """Whether each part has just one visit, which writes all its gradients."""
    return bool(q.numel()) and all(len(load.calls(bands)) == 1 for load in step.loads)


def own_parts(tensors: Sequence[Tensor], ring: Ring) -> Parts:
    """This rank's tensors, of each part of the batch."""
    return [[load.samples.of(x) for x in tensors] for load in ring.plan.steps[0].loads]


def saved_of(saved: Saved, samples: Samples) -> Saved:
    if samples.are_all:
        return saved
    dout, out, lse, delta = (samples.of(x) for x in (saved.dout, saved.out, saved.lse, saved.delta))
    return Saved(dout, out, lse, delta, saved.lse_has_gradient)


def _new_level(inputs: Tensors, ring: Ring) -> Tensor:
    """(b, h, Lq) of rows that have seen nothing; parts of the batch rise one by one."""
    bias, (batch, num_rows) = inputs.attn_bias, inputs.q.shape[:2]
    assert bias is not None
    mask = inputs.key_padding_mask is not None or _parts(ring) > 1
    shape = batch if mask else bias.shape[0], bias.shape[1], num_rows
    return torch.full(shape, -torch.inf, dtype=state_dtype(inputs.q.dtype), device=bias.device)


def calls(
    inputs: Tensors,
    step: Step,
    held: Parts,
    ring: Ring,
    bands: int,
    queries: Sequence[Tensor] | None = None,
) -> Iterator[Call]:
    """The kernel's view of one step, in visits of at most so many bands.

    Args:
        queries: Those of the plan's row that are here, of each part; None for this rank's own.
    """
    for part, (load, (k, v, *mask)) in enumerate(zip(step.loads, held, strict=True)):
        samples, plan, slopes = load.samples, ring.plan, inputs.alibi_slopes
        q = samples.of(inputs.q) if queries is None else queries[part]
        if load.seen is None or not q.numel():
            continue
        heads, q_pos, k_pos = ring.heads, None, None
        if slopes is not None or ring.scoring.dropout_p:
            q_pos = (_places(plan.queries, load.queries, q.device) + load.query_offset).int()
            k_pos = _places(plan.keys[step.owner], load.rows, q.device).int()
        bias = _bias(inputs, mask[0] if mask else None, step.owner, load, plan)
        if ring.scoring.dropout_p:
            heads = samples_heads(heads, samples)
        slopes = None if slopes is None else samples.of(slopes)
        for visit in load.calls(bands):
            piece = Block(q, k, v, visit, heads, ring.scoring, bias, slopes, q_pos, k_pos)
            yield Call(part, samples, piece)


def samples_heads(heads: Heads, samples: Samples) -> Heads:
    """Heads whose random numbers are those of these samples: a stream for each sample and head."""
    return replace(heads, offset=heads.offset + samples.start * heads.total)


def _bias(
    inputs: Tensors, mask: Tensor | None, owner: int, load: Load, plan: Plan
) -> Tensor | None:
    """The bias of the keys that are here, in the dtype of the state; hidden keys get -inf."""
    dtype, bias = state_dtype(inputs.q.dtype), None
    if inputs.attn_bias is not None:
        bias = load.samples.of(inputs.attn_bias)
        if not load.samples.are_all:  # each part has levels of its own
            bias = bias.expand(load.samples.count(inputs.q.shape[0]), -1, -1, -1)
        if plan.ring_degree > 1:
            bias = bias.index_select(3, _places(plan.keys[owner], load.rows, bias.device))
        bias = bias.to(dtype)
    if mask is not None:
        hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        hidden = hidden.masked_fill_(mask, -torch.inf)[:, None, None]
        bias = hidden if bias is None else bias + hidden
    return bias


def _places(row: Positions, rows: Rows | None, device: torch.device) -> Tensor:
    """Global positions of the rows that are here; None is all of them."""
    positions = row.on(device)
    if rows is None or rows.are_all:
        return positions
    return positions.index_select(0, rows.on(device))


def _add_columns(dbias: Tensor, found: Tensor, owner: int, load: Load, plan: Plan) -> None:
    """Add the columns of one owner's keys, summed over the dims the bias is broadcast along."""
    dbias = load.samples.of(dbias)
    columns = _places(plan.keys[owner], load.rows, dbias.device)
    dbias.index_add_(3, columns, found.sum_to_size((*dbias.shape[:3], found.shape[3])))
