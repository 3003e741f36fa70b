"""Kernels for Hopper in Gluon, Triton's lower level: one warp loads, two warpgroups multiply.

They take what training is made of, and say so of each call: attention without bias, softcap,
ALiBi and dropout, from bf16 or fp16, where rows and heads start at multiples of 16 bytes; forward
up to head dim 256, backward up to 128. All else, and all of it where Triton has no Gluon, is the
portable kernels'.

Whether a call is for them at all is said by ``configs.choose_pipeline``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usp import kernels
from usp.kernels import configs
from usp.kernels.arguments import BackwardInputs, Options, Span
from usp.kernels.hopper_configs import Pipeline

# TMA: addresses and strides are multiples of 16 bytes, strides have 40 bits
_ALIGNMENT, _FARTHEST = 16, 2**40


def takes(options: Options, *tensors: Tensor) -> bool:
    """Whether the kernels can do this; ``tensors`` are what is loaded as (B, L, H, X) tiles."""
    return (
        options.folded
        and not options.dropout_p
        and all(x.dtype in (torch.bfloat16, torch.float16) for x in tensors)
        and all(map(_fits_tma, tensors))
        and kernels.has_gluon()
    )


def _fits_tma(x: Tensor) -> bool:
    if not x.numel() or x.data_ptr() % _ALIGNMENT or (x.stride(-1) != 1 and x.shape[-1] > 1):
        return False
    strides = (
        stride * x.element_size()
        for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)
        if size > 1
    )
    return all(0 < s < _FARTHEST and not s % _ALIGNMENT for s in strides)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    out: Tensor | None,
    lse: Tensor,
    result: Tensor | None,
) -> bool:
    """The portable function of that name, or False and nothing done."""
    config = configs.choose_pipeline("forward", max(q.shape[-1], v.shape[-1]), q)
    if config is None or not takes(options, q, k, v):
        return False
    from usp.kernels.hopper import launch

    launch.attention_forward(config, q, k, v, options, out, lse, result)
    return True


def add_key_gradients(
    given: BackwardInputs, options: Options, seen_by: Span | None, dk: Tensor, dv: Tensor
) -> bool:
    """Add to dk and dv as the portable backward does, or False and nothing done."""
    config = _backward_config("backward_keys", given, options)
    if config is None:
        return False
    from usp.kernels.hopper import launch

    launch.add_key_gradients(config, given, options, seen_by, dk, dv)
    return True


def add_query_gradients(given: BackwardInputs, options: Options, dq: Tensor) -> bool:
    """Add to dq as the portable backward does, or False and nothing done."""
    config = _backward_config("backward_queries", given, options)
    if config is None:
        return False
    from usp.kernels.hopper import launch

    launch.add_query_gradients(config, given, options, dq)
    return True


def _backward_config(kernel: str, given: BackwardInputs, options: Options) -> Pipeline | None:
    q, v = given.q, given.v
    config = configs.choose_pipeline(kernel, max(q.shape[-1], v.shape[-1]), q)
    return config if config and takes(options, given.dout, q, given.k, v) else None
