"""Kernels for Hopper in Gluon, Triton's lower level: one warp loads, two warpgroups multiply.

They take what training is made of, and say so of each call: attention without bias, softcap,
ALiBi and dropout, from bf16 or fp16, where rows and heads start at multiples of 16 bytes; forward
up to head dim 256, backward up to 128. All else, and all of it where Triton has no Gluon, is the
portable kernels'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usp import kernels
from usp.kernels.arguments import KernelOptions
from usp.kernels.hopper_configs import HOPPER

# TMA: addresses and strides are multiples of 16 bytes, strides have 40 bits
_ALIGNMENT, _FARTHEST = 16, 2**40


def takes(kernel: str, options: KernelOptions, *tensors: Tensor) -> bool:
    """Whether a kernel can do this; ``tensors`` are what it loads as (B, L, H, X) tiles."""
    return (
        all(x.shape[-1] <= max(HOPPER[kernel]) for x in tensors)
        and options.folded
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
