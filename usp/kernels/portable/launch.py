"""From tensors to launches of the portable kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from usp.kernels import configs
from usp.kernels.arguments import BackwardInputs, Options, Span, cdiv, is_wide, padded, rows_of
from usp.kernels.configs import Config
from usp.kernels.portable.forward import forward_kernel
from usp.kernels.portable.key_gradients import keys_kernel
from usp.kernels.portable.query_gradients import queries_kernel


def attention_forward(
    config: Config,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    out: Tensor | None,
    lse: Tensor,
    result: Tensor | None,
) -> None:
    batch, q_len, num_heads, head_dim = q.shape
    value_dim = v.shape[-1]
    launch = configs.launch(config, q.device)
    if options.bias is not None and options.bias.shape[2] > 1:
        # its tiles take shared memory and registers: 128 keys at head dim 64 do not fit sm_90
        launch = launch | {"BLOCK_K": launch["EDGE"]}
    forward_kernel[(cdiv(q_len, config.block_q) * batch * num_heads,)](
        rows_of(q),
        rows_of(k),
        rows_of(v),
        None if out is None else rows_of(out),
        lse,
        lse.stride(0),
        lse.stride(1),
        None if result is None else rows_of(result),
        options.sizes(q, k),
        options.span,
        options.scoring,
        *options.seeds,
        D=head_dim,
        BLOCK_D=padded(head_dim),
        DV=value_dim,
        BLOCK_DV=padded(value_dim),
        FOLDED=options.folded,
        WIDE=is_wide(q, k, v, *(x for x in (out, result) if x is not None)),
        **launch,
    )


def add_key_gradients(
    config: Config,
    given: BackwardInputs,
    options: Options,
    seen_by: Span | None,
    dk: Tensor,
    dv: Tensor,
) -> None:
    batch, k_len, num_kv_heads, _ = given.k.shape
    if not options.softmax_scale:
        dk = dk.clone()
    keys_kernel[(cdiv(k_len, config.block_k) * batch * num_kv_heads,)](
        *_shared(given, options),
        seen_by,
        options.scoring,
        *options.seeds,
        rows_of(dk),
        rows_of(dv),
        _scales(options),
        **given.dims,
        WIDE=given.wide or is_wide(dk, dv),
        **configs.launch(config, given.q.device),
    )


def add_query_gradients(
    config: Config, given: BackwardInputs, options: Options, dq: Tensor
) -> None:
    batch, q_len, num_heads, _ = given.q.shape
    if not options.softmax_scale:
        dq = dq.clone()
    queries_kernel[(cdiv(q_len, config.block_q) * batch * num_heads,)](
        *_shared(given, options),
        options.span,
        options.scoring,
        *options.seeds,
        rows_of(dq),
        _scales(options),
        **given.dims,
        WIDE=given.wide or is_wide(dq),
        **configs.launch(config, given.q.device),
    )


def _shared(given: BackwardInputs, options: Options) -> tuple[Any, ...]:
    """The first arguments of both backward kernels."""
    tensors = (rows_of(x) for x in (given.dout, given.q, given.k, given.v))
    return *tensors, given.vectors, options.sizes(given.q, given.k)


def _scales(options: Options) -> tuple[float, float]:
    """Of dq and dk, and its inverse for what is held.

    No gradient passes a scale of 0, by which held sums cannot be divided: their copies are updated.
    """
    scale = options.softmax_scale
    return scale, 1 / scale if scale else 0.0
