"""The function: arguments are checked once, then exchange -> ring -> exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from usp import block
from usp.agreement import compare
from usp.arguments import Options, Request, Tensors, check, facts, slopes_of
from usp.bias import BiasCut, cut_of, gather_bias_gradient, scatter_bias
from usp.comm import Axis
from usp.layout import Layout
from usp.mesh import SequenceMesh
from usp.plan import make_plan
from usp.problem import Heads
from usp.ring import Inputs, Ring, ring_backward, ring_forward
from usp.ulysses import Cut, gather_heads, kv_heads_shared, scatter_heads, split_heads

_ALONE = Axis(1, 0, None)


def long_context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: SequenceMesh | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    cu_seqlens: Sequence[int] | Tensor | None = None,
    prefix_len: int | None = None,
    softmax_scale: float | None = None,
    layout: Layout = "contiguous",
    seq_len: int | tuple[int, int] | None = None,
    key_padding_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    transport: str = "ring",
    return_lse: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention over a sequence that is spread over the ranks of a mesh.

    Every rank of the mesh calls it with its own shard and the same options. The result does not
    depend on the mesh, the layout, the transport or the backend.

    Args:
        q: (B, Lq, H, D) fp16 | bf16 | fp32 | fp64. This rank's queries.
        k: (B, Lk, G, D), dtype and device of q; H is a multiple of G. This rank's keys.
        v: (B, Lk, G, Dv), like k.
        mesh: The ranks that share the sequence; None is one device.
        causal: Hide keys after the query's own global position (top-left also where query and
            key lengths differ).
        window_size: (left, right) keys visible on each side of the query's own position, None
            is no bound.
        cu_seqlens: Global boundaries ``(0, ..., total)`` of packed documents, host integers.
        prefix_len: First keys that ``causal`` opens to every query; a window still closes them.
        softmax_scale: Factor of ``<q, k>``, dimensionless; D ** -0.5 by default.
        layout: "contiguous", "zigzag", "striped" or ``DocumentZigzag(cu_seqlens)``: which
            tokens this rank holds, as ``shard_sequence`` cut them.
        seq_len: Tokens of the whole sequence, or (query, key) lengths; needed where shards are
            uneven, by default local tokens times ranks.
        key_padding_mask: (B, Lk) bool, True = ignore. This rank's keys.
        attn_bias: (B|1, H|1, Lq|1, all keys) added to the scores, keys in global order;
            differentiable. A dim of size 1 is the same on all ranks, and its gradient is this
            rank's part of the sum.
        dropout_p: Probability to drop a weight. The pattern depends on global positions and
            heads and one number of torch's default CPU generator: seed all ranks alike, or
            call inside ``usp.rng.replicated(mesh)``.
        dropout_seed: That number, 64 bits, the same on all ranks; drawn by default.
        softcap: Scores become ``softcap * tanh(score / softcap)``, before bias and ALiBi.
        alibi_slopes: (H,) or (B, H): minus slope times distance of global positions is added.
        transport: "ring" passes blocks of keys, "allgather" gathers them in one collective.
        return_lse: Also return the LSE.
        backend: "auto", or one of ``usp.backends()`` by name, which never falls back.
        validate: Compare the arguments of all ranks first (one small collective), so that a
            disagreement raises on every rank instead of hanging. ``LongContextAttention`` does
            it at its first call.

    Returns:
        (B, Lq, H, Dv) in the dtype of q; rows that see nothing are 0. With ``return_lse`` also
        (B, H, Lq) natural log of the sum of exp(score), fp32 (fp64 for fp64), -inf for those
        rows; both differentiable.

    Raises:
        ValueError: arguments do not fit each other, this rank's shard, or (``validate``) those
            of another rank; names both values.
        NotImplementedError: no backend takes the problem; gives each one's reasons.

    Source:
        Ulysses arXiv:2309.14509, ring attention arXiv:2310.01889, both on one mesh
        arXiv:2405.07719.
    """
    options = Options(
        causal,
        window_size,
        cu_seqlens,
        prefix_len,
        softmax_scale,
        layout,
        seq_len,
        dropout_p,
        softcap,
        transport,
        return_lse,
        backend,
    )
    q, k, v = _autocast(q, k, v)
    tensors = Tensors(q, k, v, key_padding_mask, attn_bias, alibi_slopes)
    if dropout_seed is None:
        dropout_seed = draw_dropout_seed() if dropout_p else 0
    request = _agree(tensors, options, mesh, dropout_seed, validate)
    call = _call(tensors, request, mesh)
    out, lse = cast(Any, _Attention).apply(
        q, k, v, attn_bias, key_padding_mask, slopes_of(tensors), call
    )
    return (out, lse) if return_lse else out


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as torch's own attention does."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.dtype != torch.float64 else t for t in tensors)


def draw_dropout_seed() -> int:
    """One number of torch's default CPU generator."""
    return int(torch.randint(2**62, (), device="cpu"))


def _agree(
    tensors: Tensors,
    options: Options,
    mesh: SequenceMesh | None,
    dropout_seed: int,
    validate: bool,
) -> Request:
    """Check the arguments, on request together with all ranks of the mesh."""
    if mesh is None or mesh.size == 1 or not validate:
        return check(tensors, options, mesh, dropout_seed)
    error, told, request = None, {}, None
    try:
        request = check(tensors, options, mesh, dropout_seed)
        told = facts(tensors, options, request)
    except (ValueError, NotImplementedError, TypeError) as refusal:
        error = refusal
    compare(mesh, told, error)
    assert request is not None
    return request


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


def _call(tensors: Tensors, request: Request, mesh: SequenceMesh | None) -> Call:
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


def _scatter(tensors: dict[str, Tensor], call: Call) -> list[Tensor]:
    return scatter_heads(call.ulysses, list(tensors.values()), [call.cut(n) for n in tensors])


def _gather(tensors: dict[str, Tensor], call: Call) -> list[Tensor]:
    return gather_heads(call.ulysses, list(tensors.values()), [call.cut(n) for n in tensors])


def _attention_forward(tensors: Tensors, call: Call) -> tuple[Tensor, Tensor | None, Inputs, Any]:
    """Exchange, ring, exchange.

    Returns:
        out (B, Lq, H, Dv), lse (B, H, Lq) if it was asked for; and for the backward what this
        rank computed with: its inputs and (out, lse) of its heads for its row.
    """
    inputs = _scattered_inputs(tensors, call)
    state = ring_forward(inputs, call.ring)
    held = state.out.to(tensors.q.dtype)
    if not call.request.return_lse:
        (out,) = _gather({"out": held}, call)
        return out, None, inputs, (held, state.lse)
    lse = state.lse.transpose(1, 2)[..., None]
    out, lse = _gather({"out": held, "lse": lse}, call)
    return out, lse[..., 0].transpose(1, 2).contiguous(), inputs, (held, state.lse)


def _scattered_inputs(tensors: Tensors, call: Call) -> Inputs:
    items = {"q": _last_dim_contiguous(tensors.q), "k": tensors.k, "v": tensors.v}
    items["k"], items["v"] = _last_dim_contiguous(tensors.k), _last_dim_contiguous(tensors.v)
    mask, bias, slopes = tensors.key_padding_mask, tensors.attn_bias, tensors.alibi_slopes
    if mask is not None:
        items["mask"] = mask[:, :, None, None].expand(-1, -1, call.ulysses.size, -1)
    q, k, v, *rest = _scatter(items, call)
    if bias is not None and call.bias_cut is not None:
        bias = scatter_bias(call.ulysses, bias, call.bias_cut)
    if slopes is not None:
        mine = call.ring.heads
        slopes = slopes[:, mine.offset : mine.offset + mine.count]
    return Inputs(q, k, v, rest[0][:, :, 0, 0] if rest else None, bias, slopes)


def _last_dim_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _attention_backward(
    dout: Tensor, dlse: Tensor | None, inputs: Inputs, results: Any, call: Call, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same way back: dq, dk, dv and the bias' gradient for what this rank was given."""
    out, lse = results
    items = {"out": _last_dim_contiguous(dout)}
    if dlse is not None:
        items["lse"] = dlse.transpose(1, 2)[..., None]
    dout, *rest = _scatter(items, call)
    dlse = rest[0][..., 0].transpose(1, 2) if rest else None
    saved = block.saved_for_backward(_last_dim_contiguous(dout), dlse, out, lse)
    grads = ring_backward(inputs, saved, call.ring, bias_grad)
    dtype = inputs.q.dtype
    # Key heads that several ranks read are summed on arrival: that sum is taken in fp32.
    kv_dtype = grads.dk.dtype if kv_heads_shared(call.heads) else dtype
    dq, dk, dv = _gather(
        {"q": grads.dq.to(dtype), "k": grads.dk.to(kv_dtype), "v": grads.dv.to(kv_dtype)}, call
    )
    dbias = grads.dbias
    if dbias is not None and call.bias_cut is not None:
        dbias = gather_bias_gradient(call.ulysses, dbias, call.bias_cut)
    return dq, dk.to(dtype), dv.to(dtype), dbias


class _Attention(torch.autograd.Function):
    """Autograd over ``_attention_forward`` and its twin; nothing else happens here."""

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
        out, lse, inputs, results = _attention_forward(Tensors(q, k, v, mask, bias, slopes), call)
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
        dq, dk, dv, dbias = _attention_backward(
            dout, dlse, Inputs(*saved), (out, lse), ctx.call, ctx.needs_input_grad[3]
        )
        if dbias is not None:
            dbias = dbias.to(ctx.bias_dtype)
        return dq, dk, dv, dbias, None, None, None
