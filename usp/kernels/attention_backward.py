"""Gradients of one block of keys, with the weights of the final softmax; no atomics.

Two kernels: dk and dv by tiles of keys over the rows that see them (the transposed span), dq by
tiles of rows. Both add to what is there, so a sum may travel on with its block.
"""

from __future__ import annotations

from torch import Tensor

from usp.kernels.arguments import BackwardInputs, KernelOptions, KernelSpan
from usp.kernels.choice import choose


def attention_backward(
    inputs: BackwardInputs,
    options: KernelOptions,
    seen_by: KernelSpan | None,
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
    if not inputs.lse.numel() or not inputs.k.shape[1]:
        return
    tensors = inputs.dout, inputs.q, inputs.k, inputs.v
    launch, config = choose("backward_keys", options, *tensors)
    launch.add_key_gradients(config, inputs, options, seen_by, dk, dv)
    launch, config = choose("backward_queries", options, *tensors)
    launch.add_query_gradients(config, inputs, options, dq)
