"""Gradients of one block of keys, with the weights of the final softmax; no atomics.

Two kernels: dk and dv by tiles of keys over the rows that see them (the transposed span), dq by
tiles of rows. Both add to what is there, so a sum may travel on with its block.

B batch, Lq / Lk rows of queries / keys, H query heads, G key heads, D head dim, Dv that of v.

Source: FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

from torch import Tensor

from usp.kernels import configs, hopper
from usp.kernels.arguments import BackwardInputs, Options, Span, cdiv, is_wide, rows_of
from usp.kernels.key_gradients import keys_kernel
from usp.kernels.query_gradients import queries_kernel


def attention_backward(
    given: BackwardInputs,
    options: Options,
    seen_by: Span | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Add the gradients of a block of keys to ``dq``, ``dk``, ``dv``.

    Args:
        options: As in the forward.
        seen_by: ``[first, stop)`` rows that see each key, (Lk,) int32; None with no span.
        dq, dk, dv: fp32, shapes of q, k, v, last dim contiguous.
    """
    q, k = given.q, given.k
    batch, q_len, num_heads, _ = q.shape
    k_len, num_kv_heads = k.shape[1], k.shape[2]
    if not (batch * q_len * num_heads) or not k_len:
        return
    scale = options.softmax_scale
    if not scale:  # no gradient passes a scale of 0, by which held sums cannot be divided
        dq, dk = dq.clone(), dk.clone()
    scales = (scale, 1 / scale if scale else 0.0)
    tensors = [rows_of(x) for x in (given.dout, q, k, given.v)]
    shared = (given.vectors, options.sizes(q, k))
    widest = max(q.shape[-1], given.v.shape[-1])
    if not hopper.add_key_gradients(given, options, seen_by, dk, dv):
        launch = configs.choose("backward_keys", widest, q)
        keys_kernel[(cdiv(k_len, launch["BLOCK_K"]) * batch * num_kv_heads,)](
            *tensors,
            *shared,
            seen_by,
            options.scoring,
            *options.seeds,
            rows_of(dk),
            rows_of(dv),
            scales,
            **given.dims,
            WIDE=given.wide or is_wide(dk, dv),
            **launch,
        )
    if not hopper.add_query_gradients(given, options, dq):
        launch = configs.choose("backward_queries", widest, q)
        queries_kernel[(cdiv(q_len, launch["BLOCK_Q"]) * batch * num_heads,)](
            *tensors,
            *shared,
            options.span,
            options.scoring,
            *options.seeds,
            rows_of(dq),
            scales,
            **given.dims,
            WIDE=given.wide or is_wide(dq),
            **launch,
        )
