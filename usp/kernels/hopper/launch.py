"""From tensors to launches of the Hopper kernels."""

from __future__ import annotations

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from usp.kernels.arguments import BackwardInputs, KernelOptions, KernelSpan, cdiv, view_of
from usp.kernels.hopper.forward import forward_kernel
from usp.kernels.hopper.key_gradients import keys_kernel
from usp.kernels.hopper.query_gradients import queries_kernel
from usp.kernels.hopper_configs import Pipeline

# a consumer's rows: those of one wgmma
ROWS = 64


def attention_forward(
    config: Pipeline,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: KernelOptions,
    out: Tensor | None,
    lse: Tensor,
    result: Tensor | None,
) -> None:
    batch, q_len, num_heads, _ = q.shape
    grid = (cdiv(q_len, config.block_q) * batch * num_heads,)
    forward_kernel[grid](
        described(q, ROWS),
        described(k, config.block_k),
        described(v, config.block_k),
        None if out is None else view_of(out),
        lse,
        lse.stride(0),
        lse.stride(1),
        None if result is None else view_of(result),
        options.sizes(q, k, v),
        options.span,
        options.scoring.scale,
        DV=v.shape[-1],
        **config.launch(),
    )


def add_key_gradients(
    config: Pipeline,
    inputs: BackwardInputs,
    options: KernelOptions,
    seen_by: KernelSpan | None,
    dk: Tensor,
    dv: Tensor,
) -> None:
    batch, k_len, num_kv_heads, head_dim = inputs.k.shape
    keys_kernel[(cdiv(k_len, config.block_k) * batch * num_kv_heads,)](
        described(inputs.dout, config.block_q),
        described(inputs.q, config.block_q),
        described(inputs.k, ROWS),
        described(inputs.v, ROWS),
        inputs.vectors,
        options.key_sizes(inputs.dout, inputs.q, inputs.k),
        seen_by,
        options.scoring.scale,
        view_of(dk),
        view_of(dv),
        (options.softmax_scale, 1 / options.softmax_scale),
        D=head_dim,
        DV=inputs.v.shape[-1],
        **config.launch(),
    )


def add_query_gradients(
    config: Pipeline, inputs: BackwardInputs, options: KernelOptions, dq: Tensor
) -> None:
    batch, q_len, num_heads, head_dim = inputs.q.shape
    queries_kernel[(cdiv(q_len, config.block_q) * batch * num_heads,)](
        described(inputs.dout, ROWS),
        described(inputs.q, ROWS),
        described(inputs.k, config.block_k),
        described(inputs.v, config.block_k),
        inputs.vectors,
        options.sizes(inputs.q, inputs.k, inputs.v),
        options.span,
        options.scoring.scale,
        view_of(dq),
        (options.softmax_scale, 1 / options.softmax_scale),
        D=head_dim,
        **config.launch(),
    )


def described(x: Tensor, rows: int) -> TensorDescriptor:
    """(B, L, H, X) as TMA loads it: tiles of so many rows of one head, zeros beyond L and X.

    A tile never reaches into the next sequence: rows have a dim of their own.
    """
    batch, length, heads, width = x.shape
    padded = 64 if width <= 64 else 128 if width <= 128 else 256
    # strides of dims of one element may be anything, and mean nothing
    strides = [s if n > 1 else padded for s, n in zip(x.stride(), x.shape, strict=True)]
    by_batch, by_row, by_head, _ = strides
    return TensorDescriptor(
        x,
        [batch, heads, length, width],
        [by_batch, by_head, by_row, 1],
        [1, 1, rows, padded],
        gl.NVMMASharedLayout(128, x.element_size() * 8, rank=4),
    )
