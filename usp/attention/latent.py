"""Multi-head latent attention (MLA, arXiv:2405.04434) with the latents on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from usp.attention import block
from usp.attention.arguments import drops
from usp.attention.functional import draw_dropout_seed
from usp.attention.gathered import gathered_forward
from usp.attention.given import Latents, Options, Tensors
from usp.attention.hybrid import Call, Results, prepare, returned, scattered_gradients
from usp.attention.latent_blocks import LatentRing, LatentTransport, UpProjections
from usp.attention.query_ring import QueryRing, query_ring_backward
from usp.attention.request import agree_on_request
from usp.attention.ring import Ring, ring_backward, ring_forward
from usp.attention.ulysses import gather_heads, scatter_heads
from usp.distributed.agreement import meet_in_backward
from usp.distributed.comm import untraced
from usp.distributed.double_ring import transport_along
from usp.distributed.mesh import SequenceMesh
from usp.ops.derivatives import (
    OnceDifferentiable,
    is_differentiated,
    without_second_derivative,
)
from usp.ops.precision import as_given, in_autocast
from usp.planning.heads import Cut, split_heads
from usp.planning.kinds import is_fake
from usp.planning.layout import Layouts
from usp.planning.masks.mask import Mask
from usp.planning.problem import Gradients, state_dtype


@untraced
def latent_attention(
    q: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    up_k: Tensor,
    up_v: Tensor,
    mesh: SequenceMesh | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    cu_seqlens: Sequence[int] | Tensor | Sequence[Sequence[int]] | None = None,
    prefix_len: int | None = None,
    mask: Mask | Sequence[Mask] | None = None,
    key_lengths: Sequence[int] | Tensor | None = None,
    query_offset: int | Sequence[int] | Tensor = 0,
    softmax_scale: float | None = None,
    layout: Layouts = "contiguous",
    seq_len: int | tuple[int, int] | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    softcap: float | None = None,
    transport: str = "auto",
    return_lse: bool = False,
    backend: str = "auto",
    validate: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention whose keys and values are made of latents, which alone cross ranks.

    ``k_h = [up_k_h latent, rope_key]`` and ``v_h = up_v_h latent`` for each head h. A rank sends
    C + Dr numbers a token and not the H (D + Dv) of its keys and values (576 and not 40,960 for
    DeepSeek-V3's 128 heads of 192 and 128), and makes keys and values of its own heads of what
    arrives. The result is that of ``long_context_attention`` on these keys and values.

    Args:
        q: (B, Lq, H, D), the last Dr dims rotated, as in DeepSeek's models.
        latent: (B, Lk, C), compressed keys and values after their norm.
        rope_key: (B, Lk, Dr), one rotated key for all heads; Dr may be 0. All tensors have
            the dtype of q.
        up_k: (H, D - Dr, C), with ``up_v`` of DeepSeek's ``kv_b_proj``: ``weight.view(H, -1,
            C).split((D - Dr, Dv), 1)``. The same on every rank; their gradients are this rank's
            part of the sum, like those of other parameters.
        up_v: (H, Dv, C).
        mesh, layout, seq_len, validate: See ``long_context_attention``.
        causal, window_size, cu_seqlens, prefix_len, mask: See there.
        key_lengths, query_offset, key_padding_mask: See there.
        dropout_p, dropout_seed, softcap, return_lse, backend: See there.
        softmax_scale: Default ``D ** -0.5``.
        transport: See there; of keys the latents travel. "auto" weighs them against queries.

    Returns:
        (B, Lq, H, Dv); with ``return_lse`` also (B, H, Lq). All five tensors have gradients.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``long_context_attention``; latents and
            up-projections that do not fit; it runs on real tensors alone (no export).
    """
    options = Options(
        causal=causal,
        window_size=window_size,
        cu_seqlens=cu_seqlens,
        prefix_len=prefix_len,
        mask=mask,
        key_lengths=key_lengths,
        query_offset=query_offset,
        softmax_scale=softmax_scale,
        layout=layout,
        seq_len=seq_len,
        dropout_p=dropout_p,
        softcap=softcap,
        transport=transport,
        return_lse=return_lse,
        backend=backend,
        latents=Latents(*map(in_autocast, (latent, rope_key, up_k, up_v))),
    )
    q = in_autocast(q)
    assert options.latents is not None
    given, drawn = options.latents, None
    if is_fake(q):
        raise NotImplementedError("usp.latent_attention has no op for graphs: run it eagerly")
    tensors = Tensors(q, *_like_keys(q, given), key_padding_mask)
    if dropout_seed is None and drops(dropout_p):
        drawn = int(draw_dropout_seed())
    needed = [torch.is_grad_enabled() and getattr(x, "requires_grad", False) for x in (q, *given)]
    request, name = agree_on_request(
        tensors, options, mesh, dropout_seed, drawn, validate, gradients=needed
    )
    _, call = prepare(tensors, request, mesh)
    keys = torch.cat((given.latent, given.rope_key), -1)[:, :, None]
    what = (q, keys, given.up_k, given.up_v, key_padding_mask)
    if is_differentiated(what):
        out, lse, _ = cast(Any, _LatentAttention).apply(*what, call)
    else:
        out, lse, _ = _forward(*what, call)
    if mesh is not None and name is not None:
        meet_in_backward(out, mesh, name)
    return out if lse is None else (out, lse)


def _like_keys(q: Tensor, given: Latents) -> tuple[Tensor, Tensor]:
    """What stands for keys and values where shapes are checked; q where latents are wrong, which
    is found there."""
    try:
        one = given.latent.new_empty(())
        shape = *given.latent.shape[:2], q.shape[2]
        return one.expand(*shape, q.shape[3]), one.expand(*shape, given.up_v.shape[1])
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return q, q


class _Held(NamedTuple):
    """What a rank computes with.

    Attributes:
        q: (B, N, h, D). latent: (B, M, C + Dr); no dims where no heads are held.
        up_k, up_v: Of all heads.
    """

    q: Tensor
    latent: Tensor
    up_k: Tensor
    up_v: Tensor
    mask: Tensor | None

    def up(self, call: Call) -> UpProjections:
        heads = call.heads[call.ulysses.rank]
        mine = slice(heads.offset, heads.offset + heads.count)
        return UpProjections(self.up_k[mine], self.up_v[mine], self.q.shape[3])

    def opened(self, call: Call) -> Tensors:
        return Tensors(self.q, *self.up(call).opened(self.latent), self.mask)


def _key_cut(call: Call) -> Cut:
    """How latents change hands: one head of keys for all."""
    heads = split_heads(call.request.num_heads, 1, call.ulysses.size)
    return Cut.of_key_heads(call.request.key_lengths, heads)


def _scattered(
    q: Tensor, keys: Tensor, up_k: Tensor, up_v: Tensor, mask: Tensor | None, call: Call
) -> _Held:
    if call.ulysses.size > 1:
        moving = [(q, call.query_cut), (keys, _key_cut(call))]
        if mask is not None:
            to_all = mask[:, :, None, None].expand(-1, -1, call.ulysses.size, -1)
            moving.append((to_all, call.mask_cut))
        tensors, cuts = zip(*moving, strict=True)
        q, keys, *rest = scatter_heads(call.ulysses, tensors, cuts)
        mask = rest[0][:, :, 0, 0] if rest else None
    q = q if q.stride(-1) == 1 else q.contiguous()
    return _Held(q, keys.flatten(2), up_k, up_v, mask)


def _ring(held: _Held, call: Call) -> LatentRing:
    """The ring of a pass."""
    ring = call.ring
    assert isinstance(ring, Ring)
    parts = [load.samples for load in ring.plan.steps[0].loads]
    inner = transport_along(ring.axis, ring.plan.route, ring.levels)
    dtype = state_dtype(held.q.dtype)
    opening = LatentTransport(inner, held.up(call), held.latent, held.mask, parts, dtype)
    given = {field.name: getattr(ring, field.name) for field in fields(Ring)}
    return LatentRing(**given, latents=opening)


def _forward(
    q: Tensor, keys: Tensor, up_k: Tensor, up_v: Tensor, mask: Tensor | None, call: Call
) -> tuple[Tensor, Tensor | None, tuple[_Held, Results]]:
    held = _scattered(q, keys, up_k, up_v, mask, call)
    with as_given(q.device):
        inputs = held.opened(call)
        if isinstance(call.ring, QueryRing):
            results = Results(*gathered_forward(inputs, call.ring), None)
        else:
            results = Results(*ring_forward(inputs, _ring(held, call)))
    out, lse = returned(results, call)
    return out, lse, (held, results)


def _backward(
    dout: Tensor, dlse: Tensor | None, held: _Held, results: Results, call: Call
) -> list[Tensor]:
    """Gradients of q, keys, up_k and up_v."""
    dout, dlse = scattered_gradients(dout, dlse, call)
    backend, dtype = call.ring.backend, results.lse.dtype
    with as_given(dout.device):
        inputs = held.opened(call)
        saved = block.saved_for_backward(dout, dlse, results.out, results.lse, backend)
        if isinstance(call.back, QueryRing):
            grads: Gradients = query_ring_backward(inputs, saved, call.back, dtype)
            parts = [load.samples for load in call.back.plan.steps[0].loads]
            inner = transport_along(call.back.axis, None)
            opening = LatentTransport(inner, held.up(call), held.latent, None, parts, dtype)
            own = [[each.of(grads.dk), each.of(grads.dv)] for each in parts]
            opening.fold(opening.latents, own, opening.totals)
        else:
            ring = _ring(held, call)
            assert ring.latents is not None
            grads, opening = ring_backward(inputs, saved, ring, False, dtype), ring.latents
    dq, dkeys = grads.dq, opening.gradient[:, :, None]
    heads = call.heads[call.ulysses.rank]
    if not heads.count:  # gradients of nothing, as wide as those of others
        width = held.up_k.shape[2] + held.q.shape[3] - held.up_k.shape[1]
        dkeys = dkeys.new_empty((*dkeys.shape[:2], 0, width))
    if call.ulysses.size > 1:
        dq, dkeys = gather_heads(call.ulysses, [dq, dkeys], [call.query_cut, _key_cut(call)])
    gradients = [dq, dkeys.to(held.latent.dtype)]
    mine = slice(heads.offset, heads.offset + heads.count)
    for weight, part in (
        (held.up_k, opening.sums_of_up.key),
        (held.up_v, opening.sums_of_up.value),
    ):
        whole = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        whole[mine] = part.to(weight.dtype)
        gradients.append(whole)
    return gradients


class _LatentAttention(OnceDifferentiable):
    """Autograd over ``_forward`` and its twin."""

    of = "latent_attention"

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        keys: Tensor,
        up_k: Tensor,
        up_v: Tensor,
        mask: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        out, lse, (held, results) = _forward(q, keys, up_k, up_v, mask, call)
        # what was computed with has no history after an exchange, an output has
        anchor = out.new_empty(0)
        ctx.save_for_backward(*held, results.out, results.lse, anchor)
        ctx.call = call
        return out, lse, anchor

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor, dlse: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *held, out, lse, anchor = ctx.saved_tensors
        with torch.no_grad():
            found = _backward(dout, dlse, _Held(*held), Results(out, lse, None), ctx.call)
        return *without_second_derivative(found, (dout, dlse, anchor)), None, None
