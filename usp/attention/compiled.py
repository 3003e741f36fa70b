"""Attention on one device as one opaque op, so that ``torch.compile`` keeps its graph whole.

The op plans and runs just what the eager function does; it differs in nothing but that its
arguments are those that a graph can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from usp.attention.arguments import Options, Tensors, check, slopes_of
from usp.attention.hybrid import Call, Results, attention_backward, attention_forward, make_call
from usp.planning.problem import state_dtype

_OPTIONS = (
    "bool causal, SymInt? left, SymInt? right, int[]? cu_seqlens, SymInt? prefix_len, "
    "float? softmax_scale, float? softcap, float dropout_p, bool return_lse, str backend"
)
_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, Tensor? attn_bias, "
    "Tensor? alibi_slopes, Tensor? seed"
)


def one_device_attention(
    tensors: Tensors, options: Options, dropout_seed: int | None
) -> Tensor | tuple[Tensor, Tensor]:
    """``long_context_attention`` on one device, traceable; arguments and result as there."""
    seed = None
    if options.dropout_p and dropout_seed is None:
        seed = torch.randint(2**62, (), device="cpu")
    elif options.dropout_p:
        seed = torch.tensor(dropout_seed, device="cpu")
    cu_seqlens = options.cu_seqlens
    if isinstance(cu_seqlens, Tensor):
        raise ValueError(
            "under torch.compile cu_seqlens must be a tuple: a tensor's values are not known "
            "while the graph is made"
        )
    out, lse = torch.ops.usp.attention(
        tensors.q,
        tensors.k,
        tensors.v,
        tensors.key_padding_mask,
        tensors.attn_bias,
        tensors.alibi_slopes,
        seed,
        options.causal,
        *options.window_size,
        None if cu_seqlens is None else list(cu_seqlens),
        options.prefix_len,
        options.softmax_scale,
        options.softcap,
        options.dropout_p,
        options.return_lse,
        options.backend,
    )
    return (out, lse) if options.return_lse else out


def _call(tensors: Tensors, seed: Tensor | None, settings: Sequence[Any]) -> Call:
    causal, left, right, cu_seqlens, prefix_len, scale, softcap, dropout_p, lse, backend = settings
    options = Options(
        causal=causal,
        window_size=(left, right),
        cu_seqlens=cu_seqlens,
        prefix_len=prefix_len,
        softmax_scale=scale,
        seq_len=(tensors.q.shape[1], tensors.k.shape[1]),
        dropout_p=dropout_p,
        softcap=softcap,
        return_lse=lse,
        backend=backend,
    )
    request = check(tensors, options, None, 0 if seed is None else int(seed))
    return make_call(tensors, request, None)


@torch.library.custom_op(
    "usp::attention", mutates_args=(), schema=f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)"
)
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    tensors = Tensors(q, k, v, mask, bias, slopes)
    call = _call(tensors, seed, settings)
    given = Tensors(q, k, v, mask, bias, slopes_of(tensors))
    return attention_forward(given, call).results


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads = q.shape[:3]
    out = q.new_empty((batch, length, heads, v.shape[3]))
    return out, q.new_empty((batch, heads, length), dtype=state_dtype(q.dtype))


@torch.library.custom_op(
    "usp::attention_gradients",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool bias_gradient, "
    f"{_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _gradients(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_gradient: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = Tensors(q, k, v, mask, bias, slopes)
    call = _call(tensors, seed, settings)
    inputs = Tensors(q, k, v, mask, bias, slopes_of(tensors))
    dq, dk, dv, dbias = attention_backward(
        dout, dlse, inputs, Results(out, lse), call, bias_gradient
    )
    # dk and dv are two views of one message, but outputs of an op must not share memory.
    dv = dv.clone()
    if bias is None or dbias is None:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, dbias


@_gradients.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_gradient: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = q.new_empty(0)
    if bias_gradient and bias is not None:
        dbias = bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.settings = inputs[7:]


def _backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    bias_gradient = ctx.needs_input_grad[4]
    # The LSE that nobody was given has no gradient, only zeros that autograd fills in.
    dlse = dlse if ctx.settings[-2] else None
    dq, dk, dv, dbias = torch.ops.usp.attention_gradients(
        dout, dlse, out, lse, bias_gradient, *tensors, *ctx.settings
    )
    others = (None,) * (2 + len(ctx.settings))
    return dq, dk, dv, None, dbias if bias_gradient else None, *others


_attention.register_autograd(_backward, setup_context=_setup_context)
