"""Latent attention, forward and backward: exchange, ring of latents, exchange, and the way back."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from usp.attention import block
from usp.attention.given import Tensors
from usp.attention.grid import GridRing, grid_backward, grid_forward
from usp.attention.hybrid import Call, Results, returned, scattered_gradients
from usp.attention.latent_blocks import LatentRing, LatentTransport, UpProjections
from usp.attention.ring import Ring, ring_backward, ring_forward
from usp.attention.ulysses import gather_heads, scatter_heads
from usp.distributed.double_ring import transport_along
from usp.ops.derivatives import (
    OnceDifferentiable,
    is_differentiated,
    without_second_derivative,
)
from usp.ops.precision import as_given
from usp.planning.heads import Cut, split_heads
from usp.planning.problem import Gradients, state_dtype


def attend_latents(what: tuple[Tensor | None, ...], call: Call) -> tuple[Tensor, Tensor | None]:
    """Differentiable attention of this rank's queries.

    Args:
        what: q; latents and rotary keys as one head of keys, (B, Lk, 1, C + Dr); up_k and up_v;
            the key padding mask and this rank's ALiBi slopes, or None.

    Returns:
        out: (B, Lq, H, Dv). lse: (B, H, Lq), None unless it was asked for.
    """
    if is_differentiated(what):
        out, lse, _ = cast(Any, _LatentAttention).apply(*what, call)
    else:
        out, lse, _ = cast(Any, latent_forward)(*what, call)
    return out, lse


class Held(NamedTuple):
    """What a rank computes with.

    Attributes:
        q: (B, N, h, D). latent: (B, M, C + Dr); no dims where no heads are held.
        up_k, up_v: Of all heads.
        slopes: (B|1, h), or None.
    """

    q: Tensor
    latent: Tensor
    up_k: Tensor
    up_v: Tensor
    mask: Tensor | None
    slopes: Tensor | None

    def up(self, call: Call) -> UpProjections:
        heads = call.heads[call.ulysses.rank]
        mine = slice(heads.offset, heads.offset + heads.count)
        return UpProjections(self.up_k[mine], self.up_v[mine], self.q.shape[3])

    def opened(self, call: Call) -> Tensors:
        keys = self.up(call).opened(self.latent)
        return Tensors(self.q, *keys, self.mask, None, self.slopes)


def _key_cut(call: Call) -> Cut:
    """How latents change hands: one head of keys for all."""
    heads = split_heads(call.request.num_heads, 1, call.ulysses.size)
    return Cut.of_key_heads(call.request.key_lengths, heads)


def scattered_latents(
    q: Tensor,
    keys: Tensor,
    up_k: Tensor,
    up_v: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    call: Call,
) -> Held:
    if call.ulysses.size > 1:
        moving = [(q, call.query_cut), (keys, _key_cut(call))]
        if mask is not None:
            to_all = mask[:, :, None, None].expand(-1, -1, call.ulysses.size, -1)
            moving.append((to_all, call.mask_cut))
        tensors, cuts = zip(*moving, strict=True)
        q, keys, *rest = scatter_heads(call.ulysses, tensors, cuts)
        mask = rest[0][:, :, 0, 0] if rest else None
    q = q if q.stride(-1) == 1 else q.contiguous()
    return Held(q, keys.flatten(2), up_k, up_v, mask, slopes)


def _ring(held: Held, call: Call) -> LatentRing:
    """The ring of a pass."""
    ring = call.ring
    assert isinstance(ring, Ring)
    parts = [load.samples for load in ring.plan.steps[0].loads]
    inner = transport_along(ring.axis, ring.plan.route, ring.levels)
    dtype = state_dtype(held.q.dtype)
    opening = LatentTransport(inner, held.up(call), held.latent, held.mask, parts, dtype)
    given = {field.name: getattr(ring, field.name) for field in fields(Ring)}
    return LatentRing(**given, latents=opening)


def latent_forward(
    q: Tensor,
    keys: Tensor,
    up_k: Tensor,
    up_v: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor | None, tuple[Held, Results]]:
    held = scattered_latents(q, keys, up_k, up_v, mask, slopes, call)
    with as_given(q.device):
        inputs = held.opened(call)
        if isinstance(call.ring, GridRing):
            results = Results(*grid_forward(inputs, call.ring), None)
        else:
            results = Results(*ring_forward(inputs, _ring(held, call)))
    out, lse = returned(results, call)
    return out, lse, (held, results)


def latent_backward(
    dout: Tensor, dlse: Tensor | None, held: Held, results: Results, call: Call
) -> list[Tensor]:
    """Gradients of q, keys, up_k and up_v."""
    dout, dlse = scattered_gradients(dout, dlse, call)
    backend, dtype = call.ring.backend, results.lse.dtype
    with as_given(dout.device):
        inputs = held.opened(call)
        saved = block.saved_for_backward(dout, dlse, results.out, results.lse, backend)
        if isinstance(call.back, GridRing):
            grads: Gradients = grid_backward(inputs, saved, call.back, dtype)
            parts = call.back.samples
            opening = LatentTransport(
                call.back.transport, held.up(call), held.latent, None, parts, dtype
            )
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
        slopes: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        out, lse, (held, results) = latent_forward(q, keys, up_k, up_v, mask, slopes, call)
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
        ctx.call.meet()
        with torch.no_grad():
            found = latent_backward(dout, dlse, Held(*held), Results(out, lse, None), ctx.call)
        return *without_second_derivative(found, (dout, dlse, anchor)), None, None, None
