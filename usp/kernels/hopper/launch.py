"""From tensors to launches of the Hopper kernels."""

from __future__ import annotations

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from usp.kernels.arguments import BackwardInputs, Options, Span, cdiv, rows_of
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
    options: Options,
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
        None if out is None else rows_of(out),
        lse,
        lse.stride(0),
        lse.stride(1),
        None if result is None else rows_of(result),
        options.sizes(q, k),
        options.span,
        options.scoring.scale,
        DV=v.shape[-1],
        **config.launch(),
    )


def add_key_gradients(
    config: Pipeline,
    given: BackwardInputs,
    options: Options,
    seen_by: Span | None,
    dk: Tensor,
    dv: Tensor,
) -> None:
    batch, k_len, num_kv_heads, head_dim = given.k.shape
    keys_kernel[(cdiv(k_len, config.block_k) * batch * num_kv_heads,)](
        described(given.dout, config.block_q),
        described(given.q, config.block_q),
        described(given.k, ROWS),
        described(given.v, ROWS),
        given.vectors,
        options.sizes(given.q, given.k),
        seen_by,
        options.scoring.scale,
        rows_of(dk),
        rows_of(dv),
        (options.softmax_scale, 1 / options.softmax_scale),
        D=head_dim,
        DV=given.v.shape[-1],
        **config.launch(),
    )


def add_query_gradients(
    config: Pipeline, given: BackwardInputs, options: Options, dq: Tensor
) -> None:
    batch, q_len, num_heads, head_dim = given.q.shape
    queries_kernel[(cdiv(q_len, config.block_q) * batch * num_heads,)](
        described(given.dout, ROWS),
        described(given.q, ROWS),
        described(given.k, config.block_k),
        described(given.v, config.block_k),
        given.vectors,
        options.sizes(given.q, given.k),
        options.span,
        options.scoring.scale,
        rows_of(dq),
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
