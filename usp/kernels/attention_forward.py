"""One block of keys into the running softmax, in one pass: the state is loaded and stored once."""

from __future__ import annotations

from torch import Tensor

from usp.kernels.arguments import KernelOptions
from usp.kernels.choice import choose


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: KernelOptions,
    out: Tensor | None,
    lse: Tensor,
    result: Tensor | None = None,
) -> None:
    """Let a block of keys into the state, in place.

    Args:
        q: (B, Lq, H, D). k: (B, Lk, G, D). v: (B, Lk, G, Dv). fp32, bf16 or fp16, last dim
            contiguous, any other strides and sizes.
        options: As the contract of docs/contract.md has it.
        out: (B, Lq, H, Dv) fp32, last dim contiguous; None is one that has seen nothing.
        lse: (B, H, Lq) fp32, last dim contiguous.
        result: Like out, any floating dtype: gets what ``out`` would, which stays as it was.
            Must be there where ``out`` is not.
    """
    if lse.numel():
        launch, config = choose("forward", options, q, k, v)
        launch.attention_forward(config, q, k, v, options, out, lse, result)
