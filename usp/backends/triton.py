"""Triton kernels, for NVIDIA and AMD, which carry the running softmax in and out."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from usp import kernels
from usp.kernels.arguments import BackwardInputs, KernelOptions, KernelSpan
from usp.planning.problem import Block, Gradients, Saved, State, Traits

NAME = "triton"
CARRIES_STATE = True
OVERWRITES = False
PACKAGES = ("triton",)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


def unavailable() -> str | None:
    return kernels.unavailable()


def reasons_against(traits: Traits) -> tuple[str, ...]:
    reasons = []
    against = kernels.reason_against(traits.device_type)
    if against is not None:
        reasons.append(against)
    if traits.dtype not in _DTYPES:
        reasons.append(f"it computes in fp32, from fp32, bf16 or fp16 and not from {traits.dtype}")
    widest = max(traits.head_dim, traits.value_head_dim)
    if widest > _MAX_HEAD_DIM:
        reasons.append(f"a head dim of {widest} is above {_MAX_HEAD_DIM}, its tiles would not fit")
    return tuple(reasons)


def variant(traits: Traits) -> str | None:
    """Kernels that take a problem's calls from the portable ones, once they were found right.

    Which calls they take depends on addresses and strides too (``kernels/hopper``).
    """
    if traits.architecture != "sm_90" or traits.dtype not in (torch.bfloat16, torch.float16):
        return None
    if traits.bias or traits.softcap or traits.alibi or traits.dropout or traits.softmax_scale <= 0:
        return None
    return "Gluon" if kernels.has_gluon() else None


def only_variant() -> AbstractContextManager[None]:
    """In here the variant does what it can."""
    from usp.kernels import configs

    return configs.pipelined()


def use_variant(traits: Traits) -> None:
    """The variant was found right for such problems."""
    from usp.kernels import configs

    assert traits.device is not None
    widest = max(traits.head_dim, traits.value_head_dim)
    configs.prefer_pipelines(traits.device, traits.dtype, widest)


def attention_forward(block: Block, state: State) -> None:
    from usp.kernels import attention_forward as kernel

    with kernels.launch_guard(block.q):
        kernel.attention_forward(
            block.q,
            block.k,
            block.v,
            KernelOptions(*block.options),
            state.out,
            state.lse,
            state.result,
        )


def delta(dout: Tensor, out: Tensor) -> Tensor:
    from usp.kernels.attention_delta import attention_delta

    with kernels.launch_guard(out):
        return attention_delta(dout, out)


def attention_backward(block: Block, saved: Saved, grads: Gradients) -> None:
    from usp.kernels import attention_backward as kernel

    seen_by = block.visit.seen_by
    spans = None if seen_by is None else KernelSpan(*seen_by.on(block.q.device))
    inputs = BackwardInputs(saved.dout, block.q, block.k, block.v, saved.delta, saved.lse)
    options = KernelOptions(*block.options)
    with kernels.launch_guard(block.q):
        kernel.attention_backward(inputs, options, spans, grads.dq, grads.dk, grads.dv)
        if grads.dbias is not None:
            from usp.kernels.bias_gradient import bias_gradient

            bias_gradient(inputs, options, spans, grads.dbias)
