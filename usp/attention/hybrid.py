"""Ulysses and ring on one mesh: exchange -> ring -> exchange, and the same way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from usp.attention import block
from usp.attention.arguments import Request, Tensors
from usp.attention.bias import BiasCut, cut_of, gather_bias_gradient, scatter_bias
from usp.attention.ring import Inputs, Ring, ring_backward, ring_forward
from usp.attention.ulysses import gather_heads, scatter_heads
from usp.distributed.comm import Axis
from usp.distributed.mesh import SequenceMesh
from usp.planning.heads import Cut, Heads, kv_heads_shared, split_heads
from usp.planning.plan import make_plan

_ALONE = Axis(1, 0, None)
Results = tuple[Tensor, Tensor]
Exchange = Callable[[Axis, Sequence[Tensor], Sequence[Cut]], list[Tensor]]


def hybrid_attention(tensors: Tensors, call: Call) -> tuple[Tensor, Tensor | None]:
    """Differentiable attention of this rank's queries.

    Returns:
        out: (B, Lq, H, Dv). lse: (B, H, Lq), None unless it was asked for.
    """
    mask, slopes = tensors.key_padding_mask, tensors.alibi_slopes
    apply = cast(Any, _Attention).apply
    return apply(tensors.q, tensors.k, tensors.v, tensors.attn_bias, mask, slopes, call)


@dataclass(frozen=True, eq=False)
class Call:
    """All that forward and backward share besides tensors.

    Attributes:
        ulysses: The row's axis.
        ring: The executor's part.
        heads: Query heads of each rank of the row.
        request: The arguments.
        bias_cut: How the bias changes hands, if there is one.
    """

    ulysses: Axis
    ring: Ring
    heads: tuple[Heads, ...]
    request: Request
    bias_cut: BiasCut | None

    def cut(self, name: str) -> Cut:
        """How the tensor of that name is cut among the ranks of the row."""
        request = self.request
        of_queries = name in ("q", "out", "lse")
        lengths = request.query_lengths if of_queries else request.key_lengths
        if name in ("q", "out", "lse"):
            held = tuple((h.offset, h.offset + h.count) for h in self.heads)
        elif name in ("k", "v"):
            held = tuple(h.kv_range for h in self.heads)
        else:
            held = tuple((rank, rank + 1) for rank in range(self.ulysses.size))
        return Cut(lengths, held)


def make_call(tensors: Tensors, request: Request, mesh: SequenceMesh | None) -> Call:
    """What this rank does for a request: its place, plan and heads."""
    ulysses, ring = (_ALONE, _ALONE) if mesh is None else (mesh.ulysses, mesh.ring)
    heads = split_heads(request.num_heads, request.num_kv_heads, ulysses.size)
    plan = make_plan(
        request.mask, request.layout, request.query_len, request.key_len, ring.size, ring.rank
    )
    bias_cut = None
    if tensors.attn_bias is not None:
        bias_cut = cut_of(ulysses, tensors.attn_bias, request.query_lengths, heads)
    executor = Ring(
        ring, plan, request.transport, heads[ulysses.rank], request.scoring, request.backend
    )
    return Call(ulysses, executor, heads, request, bias_cut)


def _exchanged(way: Exchange, tensors: dict[str, Tensor], call: Call) -> list[Tensor]:
    """The tensors there or back; a row of one rank holds what it needs."""
    if call.ulysses.size == 1:
        return list(tensors.values())
    return way(call.ulysses, list(tensors.values()), [call.cut(name) for name in tensors])


def attention_forward(
    tensors: Tensors, call: Call
) -> tuple[Tensor, Tensor | None, Inputs, Results]:
    """Exchange, ring, exchange.

    Returns:
        out (B, Lq, H, Dv), lse (B, H, Lq) if it was asked for; and for the backward what this
        rank computed with: its inputs and (out, lse) of its heads for its row.
    """
    inputs = _scattered_inputs(tensors, call)
    held = ring_forward(inputs, call.ring)
    if not call.request.return_lse:
        (out,) = _exchanged(gather_heads, {"out": held[0]}, call)
        return out, None, inputs, held
    lse = held[1].transpose(1, 2)[..., None]
    out, lse = _exchanged(gather_heads, {"out": held[0], "lse": lse}, call)
    return out, lse[..., 0].transpose(1, 2).contiguous(), inputs, held


def _scattered_inputs(tensors: Tensors, call: Call) -> Inputs:
    items = {"q": _last_dim_contiguous(tensors.q), "k": tensors.k, "v": tensors.v}
    items["k"], items["v"] = _last_dim_contiguous(tensors.k), _last_dim_contiguous(tensors.v)
    mask, bias, slopes = tensors.key_padding_mask, tensors.attn_bias, tensors.alibi_slopes
    if mask is not None:
        items["mask"] = mask[:, :, None, None].expand(-1, -1, call.ulysses.size, -1)
    q, k, v, *rest = _exchanged(scatter_heads, items, call)
    if bias is not None and call.bias_cut is not None:
        bias = scatter_bias(call.ulysses, bias, call.bias_cut)
    if slopes is not None:
        mine = call.ring.heads
        slopes = slopes[:, mine.offset : mine.offset + mine.count]
    return Inputs(q, k, v, rest[0][:, :, 0, 0] if rest else None, bias, slopes)


def _last_dim_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def attention_backward(
    dout: Tensor, dlse: Tensor | None, inputs: Inputs, results: Results, call: Call, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same way back: dq, dk, dv and the bias' gradient for what this rank was given."""
    out, lse = results
    items = {"out": _last_dim_contiguous(dout)}
    if dlse is not None:
        items["lse"] = dlse.transpose(1, 2)[..., None]
    dout, *rest = _exchanged(scatter_heads, items, call)
    dlse = rest[0][..., 0].transpose(1, 2) if rest else None
    dout = _last_dim_contiguous(dout)
    saved = block.saved_for_backward(dout, dlse, out, lse, call.ring.backend)
    dtype = inputs.q.dtype
    # Key heads that several ranks read are summed on arrival: that sum is taken in fp32.
    kv_dtype = lse.dtype if kv_heads_shared(call.heads) else dtype
    grads = ring_backward(inputs, saved, call.ring, bias_grad, kv_dtype)
    dq, dk, dv = _exchanged(gather_heads, {"q": grads.dq, "k": grads.dk, "v": grads.dv}, call)
    dbias = grads.dbias
    if dbias is not None and call.bias_cut is not None:
        dbias = gather_bias_gradient(call.ulysses, dbias, call.bias_cut)
    return dq, dk.to(dtype), dv.to(dtype), dbias


class _Attention(torch.autograd.Function):
    """Autograd over ``attention_forward`` and its twin; nothing else happens here."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        slopes: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, Tensor | None]:
        out, lse, inputs, results = attention_forward(Tensors(q, k, v, mask, bias, slopes), call)
        ctx.save_for_backward(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.key_padding_mask,
            inputs.bias,
            inputs.alibi_slopes,
            *results,
        )
        ctx.call, ctx.bias_dtype = call, None if bias is None else bias.dtype
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, out, lse = ctx.saved_tensors
        dq, dk, dv, dbias = attention_backward(
            dout, dlse, Inputs(*saved), (out, lse), ctx.call, ctx.needs_input_grad[3]
        )
        if dbias is not None:
            dbias = dbias.to(ctx.bias_dtype)
        return dq, dk, dv, dbias, None, None, None
