"""From tensors to launches of the portable kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from usp.kernels import configs
from usp.kernels.arguments import (
    BackwardInputs,
    KernelOptions,
    KernelSpan,
    cdiv,
    is_wide,
    padded,
    view_of,
)
from usp.kernels.configs import Config
from usp.kernels.portable.forward import forward_kernel
from usp.kernels.portable.key_gradients import keys_kernel
from usp.kernels.portable.query_gradients import queries_kernel


def attention_forward(
    config: Config,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: KernelOptions,
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
        view_of(q),
        view_of(k),
        view_of(v),
        None if out is None else view_of(out),
        lse,
        lse.stride(0),
        lse.stride(1),
        None if result is None else view_of(result),
        options.sizes(q, k, v),
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
    inputs: BackwardInputs,
    options: KernelOptions,
    seen_by: KernelSpan | None,
    dk: Tensor,
    dv: Tensor,
) -> None:
    batch, k_len, num_kv_heads, _ = inputs.k.shape
    if not options.softmax_scale:
        dk = dk.clone()
    keys_kernel[(cdiv(k_len, config.block_k) * batch * num_kv_heads,)](
        *_tensors(inputs),
        options.key_sizes(inputs.dout, inputs.q, inputs.k),
        seen_by,
        options.scoring,
        *options.seeds,
        view_of(dk),
        view_of(dv),
        _scales(options),
        **inputs.dims,
        WIDE=inputs.wide or is_wide(dk, dv),
        **configs.launch(config, inputs.q.device),
    )


def add_query_gradients(
    config: Config, inputs: BackwardInputs, options: KernelOptions, dq: Tensor
) -> None:
    batch, q_len, num_heads, _ = inputs.q.shape
    if not options.softmax_scale:
        dq = dq.clone()
    queries_kernel[(cdiv(q_len, config.block_q) * batch * num_heads,)](
        *_tensors(inputs),
        options.sizes(inputs.q, inputs.k, inputs.v),
        options.span,
        options.scoring,
        *options.seeds,
        view_of(dq),
        _scales(options),
        **inputs.dims,
        WIDE=inputs.wide or is_wide(dq),
        **configs.launch(config, inputs.q.device),
    )


def _tensors(inputs: BackwardInputs) -> tuple[Any, ...]:
    """The first arguments of both backward kernels."""
    tensors = (view_of(x) for x in (inputs.dout, inputs.q, inputs.k, inputs.v))
    return *tensors, inputs.vectors


def _scales(options: KernelOptions) -> tuple[float, float]:
    """Of dq and dk, and its inverse for what is held.

    No gradient passes a scale of 0, by which held sums cannot be divided: their copies are updated.
    """
    scale = options.softmax_scale
    return scale, 1 / scale if scale else 0.0
