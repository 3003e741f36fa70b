"""Multi-head latent attention (MLA, arXiv:2405.04434) with the latents on the wire."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from usp.attention import latent_op
from usp.attention.arguments import drops
from usp.attention.functional import draw_dropout_seed, prepared
from usp.attention.given import Latents, Options, Tensors
from usp.attention.hybrid import own_slopes, prepare
from usp.attention.latent_passes import attend_latents
from usp.attention.request import agree_on_request
from usp.attention.sinks import beside_sinks
from usp.attention.watched import seen_whole
from usp.distributed.comm import untraced
from usp.distributed.mesh import SequenceMesh
from usp.ops.precision import in_autocast
from usp.planning.layout import Layouts
from usp.planning.masks.mask import Mask


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
    softmax_scale: float | Tensor | None = None,
    layout: Layouts = "contiguous",
    seq_len: int | tuple[int, int] | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    transport: str = "auto",
    return_lse: bool = False,
    backend: str = "auto",
    heads: tuple[int, int] | None = None,
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
        dropout_p, dropout_seed, softcap, alibi_slopes, sinks: See there.
        return_lse, backend, heads: See there.
        softmax_scale: Default ``D ** -0.5``; or a tensor, see there.
        transport: See there; of keys the latents travel. "auto" weighs them against queries.

    Returns:
        (B, Lq, H, Dv); with ``return_lse`` also (B, H, Lq). All five tensors have gradients, and
        ``sinks`` and a scale that is a tensor.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``long_context_attention``; latents and
            up-projections that do not fit.
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
        heads=heads,
        sinks=sinks,
        latents=Latents(*map(in_autocast, (latent, rope_key, up_k, up_v))),
    )
    q, given = in_autocast(q), options.latents
    assert given is not None
    tensors = Tensors(q, *_like_keys(q, given), key_padding_mask, None, alibi_slopes)
    tensors, options = prepared(tensors, options, mesh, validate)
    return beside_sinks(
        options, lambda told: _dispatched(tensors, told, mesh, dropout_seed, validate)
    )


def _dispatched(
    tensors: Tensors,
    options: Options,
    mesh: SequenceMesh | None,
    dropout_seed: int | None,
    validate: bool | None,
) -> Tensor | tuple[Tensor, Tensor]:
    found = seen_whole(latent_op.attention, tensors, options, mesh, dropout_seed, validate)
    return _attend(tensors, options, mesh, dropout_seed, validate) if found is None else found


@untraced
def _attend(
    tensors: Tensors,
    options: Options,
    mesh: SequenceMesh | None,
    dropout_seed: int | None,
    validate: bool | None,
) -> Tensor | tuple[Tensor, Tensor]:
    q, given, drawn = tensors.q, options.latents, None
    assert given is not None
    if dropout_seed is None and drops(options.dropout_p):
        drawn = int(draw_dropout_seed())
    needed = [torch.is_grad_enabled() and getattr(x, "requires_grad", False) for x in (q, *given)]
    request, name = agree_on_request(
        tensors, options, mesh, dropout_seed, drawn, validate, gradients=needed
    )
    tensors, call = prepare(tensors, request, mesh)
    keys = torch.cat((given.latent, given.rope_key), -1)[:, :, None]
    slopes = own_slopes(tensors.alibi_slopes, call)
    out, lse = attend_latents(
        (q, keys, given.up_k, given.up_v, tensors.key_padding_mask, slopes), call.named(mesh, name)
    )
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
