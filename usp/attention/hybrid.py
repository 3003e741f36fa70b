"""Ulysses and ring on one mesh: exchange -> ring -> exchange, and the same way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from usp.attention import block, levels
from usp.attention.arguments import Request, slopes_of
from usp.attention.bias import BiasCut, agree_on_bias_rows, gather_bias_gradient, scatter_bias
from usp.attention.block import last_dim_contiguous
from usp.attention.executors import ALONE, Executor, executors, local_executor
from usp.attention.given import Tensors
from usp.attention.grid import GridRing, grid_backward, grid_forward
from usp.attention.replicas import Replicas, replicas_forward, summed
from usp.attention.ring import Ring, ring_backward, ring_forward
from usp.attention.single import Single, single_attention
from usp.attention.ulysses import gather_heads, scatter_heads
from usp.distributed.agreement import meet_before_backward
from usp.distributed.comm import Axis
from usp.distributed.mesh import SequenceMesh
from usp.ops.derivatives import (
    OnceDifferentiable,
    is_differentiated,
    without_second_derivative,
)
from usp.ops.precision import as_given
from usp.planning.heads import Cut, Heads, kv_heads_shared, split_heads
from usp.planning.layout import replicated

Exchange = Callable[[Axis, Sequence[Tensor], Sequence[Cut]], list[Tensor]]


def hybrid_attention(tensors: Tensors, call: Call) -> tuple[Tensor, Tensor | None]:
    """Differentiable attention of this rank's queries.

    Returns:
        out: (B, Lq, H, Dv). lse: (B, H, Lq), None unless it was asked for.
    """
    if call.single is not None:
        return single_attention(tensors, call.single, call.meet)
    if not is_differentiated(tensors):
        given = attention_forward(tensors, call)
        return given.out, given.lse
    out, lse, _ = cast(Any, _Attention).apply(*tensors, call)
    return out, lse


class Results(NamedTuple):
    """Of the heads that this rank computed, for all queries of its row."""

    out: Tensor
    lse: Tensor
    level: Tensor | None  # (B|1, H|1, Lq), what lse is relative to


class Forward(NamedTuple):
    """What the forward leaves.

    Attributes:
        out: (B, Lq, H, Dv).
        lse: (B, H, Lq), None unless it was asked for.
        inputs, results: For the backward: what this rank computed with, and what came of it.
    """

    out: Tensor
    lse: Tensor | None
    inputs: Tensors
    results: Results


@dataclass(frozen=True, eq=False)
class Call:
    """All that forward and backward share besides tensors.

    Attributes:
        ulysses: The row's axis.
        ring: The executor's part of the forward.
        heads: Query heads of each rank of the row, of those of this call.
        request: The arguments.
        bias_cut: How the bias changes hands, if there is one.
        back: That of the backward.
        single: The executor in their place where one visit is all there is to do.
        name: Of the call, and on which mesh, where the ranks have met.
    """

    ulysses: Axis
    ring: Executor
    heads: tuple[Heads, ...]
    request: Request
    bias_cut: BiasCut | None
    back: Ring
    single: Single | None = None
    name: tuple[SequenceMesh, int] | None = None

    def named(self, mesh: SequenceMesh | None, name: int | None) -> Call:
        """The same, by the name that the ranks have told each other, if they have met."""
        return self if mesh is None or name is None else replace(self, name=(mesh, name))

    def meet(self) -> None:
        """In the backward: behind what a checkpoint computes again for it, which a rank may do
        alone, and before anything is sent."""
        if self.name is not None:
            meet_before_backward(*self.name)

    @cached_property
    def query_cut(self) -> Cut:
        """How q, out and lse are cut among the ranks of the row."""
        return Cut.of_query_heads(self.request.query_lengths, self.heads)

    @cached_property
    def key_cut(self) -> Cut:
        """How k and v are cut."""
        return Cut.of_key_heads(self.request.key_lengths, self.heads)

    @cached_property
    def mask_cut(self) -> Cut:
        """How the key padding mask is cut: every rank needs all of it."""
        return Cut.one_for_each(self.request.key_lengths)


def prepare(
    tensors: Tensors, request: Request, mesh: SequenceMesh | None, bias_rows: bool | None = None
) -> tuple[Tensors, Call]:
    """What this rank does for a request, its place, plan and heads, and with what.

    Args:
        tensors, request: As given, and checked.
        mesh: Who shares the sequence; None is one device.
        bias_rows: Whether the bias differs among queries; None where it is still to be found
            out, which may ask the row.
    """
    tensors = tensors._replace(alibi_slopes=slopes_of(tensors))
    alone = mesh is None or replicated(request.layouts)
    ulysses = ALONE if mesh is None or alone else mesh.ulysses
    heads = split_heads(request.num_heads, request.num_kv_heads, ulysses.size)
    bias_cut = None
    if tensors.attn_bias is not None:
        lengths = request.query_lengths
        if bias_rows is None:
            bias_rows = agree_on_bias_rows(ulysses, tensors.attn_bias, lengths)
        bias_cut = BiasCut(lengths, heads, bias_rows, tensors.attn_bias.shape[1] == heads[0].total)
    held = heads[ulysses.rank]
    if request.all_heads != request.num_heads:
        held = replace(held, offset=held.offset + request.first_head, total=request.all_heads)
    make = local_executor if replicated(request.layouts) else executors
    executor, back = make(mesh, held, tensors, request)
    single = None
    if ulysses.size == 1:
        single = Single.of(tensors, executor, request.return_lse)
    return tensors, Call(ulysses, executor, heads, request, bias_cut, back, single)


def _exchanged(way: Exchange, tensors: Sequence[tuple[Tensor, Cut]], call: Call) -> list[Tensor]:
    """The tensors there or back, in a row of several ranks; one rank holds what it needs."""
    return way(call.ulysses, [tensor for tensor, _ in tensors], [cut for _, cut in tensors])


def attention_forward(tensors: Tensors, call: Call) -> Forward:
    """Exchange, ring, exchange."""
    inputs, large_bias = scattered(tensors, call), False
    if inputs.attn_bias is not None:
        bias, large_bias = levels.prepared(inputs.attn_bias)
        inputs = inputs._replace(attn_bias=bias)
    with as_given(tensors.q.device):
        if isinstance(call.ring, GridRing):
            held = Results(*grid_forward(inputs, call.ring), None)
        elif isinstance(call.ring, Replicas):
            held = Results(*replicas_forward(inputs, call.ring), None)
        else:
            held = Results(*ring_forward(inputs, call.ring, large_bias))
    return Forward(*returned(held, call), inputs, held)


def returned(held: Results, call: Call) -> tuple[Tensor, Tensor | None]:
    """out and lse, if it was asked for, of this rank's queries."""
    if call.ulysses.size == 1:
        lse = levels.returned(held.lse, held.level) if call.request.return_lse else None
        return held.out, lse
    if not call.request.return_lse:
        (out,) = _exchanged(gather_heads, [(held.out, call.query_cut)], call)
        return out, None
    lse = levels.returned(held.lse, held.level).transpose(1, 2)[..., None]
    exchanged = [(held.out, call.query_cut), (lse, call.query_cut)]
    out, lse = _exchanged(gather_heads, exchanged, call)
    return out, lse[..., 0].transpose(1, 2).contiguous()


def scattered(tensors: Tensors, call: Call) -> Tensors:
    """What this rank computes with: its heads for all tokens of its row."""
    q, k, v = (last_dim_contiguous(x) for x in (tensors.q, tensors.k, tensors.v))
    mask, bias, slopes = tensors.key_padding_mask, tensors.attn_bias, tensors.alibi_slopes
    if call.ulysses.size == 1:
        return Tensors(q, k, v, mask, bias, slopes)
    moving = [(q, call.query_cut), (k, call.key_cut), (v, call.key_cut)]
    if mask is not None:
        heads = mask[:, :, None, None].expand(-1, -1, call.ulysses.size, -1)
        moving.append((heads, call.mask_cut))
    q, k, v, *rest = _exchanged(scatter_heads, moving, call)
    if bias is not None and call.bias_cut is not None:
        bias = scatter_bias(call.ulysses, bias, call.bias_cut)
    return Tensors(q, k, v, rest[0][:, :, 0, 0] if rest else None, bias, own_slopes(slopes, call))


def own_slopes(slopes: Tensor | None, call: Call) -> Tensor | None:
    """(B|1, own heads) of (B|1, H)."""
    mine = call.heads[call.ulysses.rank]
    return None if slopes is None else slopes[:, mine.offset : mine.offset + mine.count]


def scattered_gradients(
    dout: Tensor, dlse: Tensor | None, call: Call
) -> tuple[Tensor, Tensor | None]:
    """Those of this rank's heads, for all queries of its row."""
    if call.ulysses.size > 1:
        moving = [(last_dim_contiguous(dout), call.query_cut)]
        if dlse is not None:
            moving.append((dlse.transpose(1, 2)[..., None], call.query_cut))
        dout, *rest = _exchanged(scatter_heads, moving, call)
        dlse = rest[0][..., 0].transpose(1, 2) if rest else None
    return last_dim_contiguous(dout), dlse


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    inputs: Tensors,
    results: Results,
    call: Call,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same way back: dq, dk, dv and the bias' gradient for what this rank was given."""
    dout, dlse = scattered_gradients(dout, dlse, call)
    ring, dtype = call.back, inputs.q.dtype
    if isinstance(call.ring, Replicas):
        with as_given(dout.device):
            dout, *rest = summed([dout] if dlse is None else [dout, dlse], call.ring)
        dlse = rest[0] if rest else None
    dout = last_dim_contiguous(dout)
    # Key heads that several ranks read are summed on arrival: that sum is taken in fp32.
    kv_dtype = results.lse.dtype if kv_heads_shared(call.heads) else dtype
    with as_given(dout.device):
        saved = block.saved_for_backward(dout, dlse, results.out, results.lse, ring.backend)
        if isinstance(ring, GridRing):
            grads = grid_backward(inputs, saved, ring, kv_dtype)
        else:
            grads = ring_backward(inputs, saved, ring, bias_gradient, kv_dtype, results.level)
    dq, dk, dv = grads.dq, grads.dk, grads.dv
    if call.ulysses.size > 1:
        moving = [(dq, call.query_cut), (dk, call.key_cut), (dv, call.key_cut)]
        dq, dk, dv = _exchanged(gather_heads, moving, call)
    dbias = grads.dbias
    if dbias is not None and inputs.attn_bias is not None and call.bias_cut is not None:
        dbias = gather_bias_gradient(call.ulysses, dbias, call.bias_cut).to(inputs.attn_bias.dtype)
    return dq, dk.to(dtype), dv.to(dtype), dbias


class _Attention(OnceDifferentiable):
    """Autograd over ``attention_forward`` and its twin; nothing else happens here."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        slopes: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        given = attention_forward(Tensors(q, k, v, mask, bias, slopes), call)
        # what was computed with has no history after an exchange, an output has; and a checkpoint
        # that computes torch's attention in the place of this one counts fewer tensors
        anchor = given.out.new_empty(0)
        ctx.save_for_backward(*given.inputs, *given.results, anchor)
        ctx.call = call
        return given.out, given.lse, anchor

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor, dlse: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *inputs, out, lse, level, anchor = ctx.saved_tensors
        ctx.call.meet()
        results = Results(out, lse, level)
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            found = attention_backward(
                dout, dlse, Tensors(*inputs), results, ctx.call, ctx.needs_input_grad[4]
            )
        dq, dk, dv, dbias = without_second_derivative(found, (dout, dlse, anchor))
        return dq, dk, dv, None, dbias, None, None
