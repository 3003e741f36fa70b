"""The compiled extension's own kernels, which carry the running softmax in and out."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from usp.ops import native as ops
from usp.planning.problem import Block, Gradients, Saved, State, Traits, state_dtype

NAME = "native"
CARRIES_STATE = True
OVERWRITES = True
MAX_BANDS = {"cpu": 16}
# what the GPU kernels' tiles take (csrc/gpu/tiles.h)
_GPU_DTYPES = (torch.bfloat16, torch.float16)
_GPU_MAX_HEAD_DIM = 256


def unavailable() -> str | None:
    error = ops.load_error()
    return None if error is None else f"the compiled extension is not there: {error}"


def reasons_against(traits: Traits) -> tuple[str, ...]:
    missing = unavailable()
    if missing is not None:
        return (missing,)
    if not ops.is_there("attention_forward", traits.device_type):
        return (f"it was built without kernels for {traits.device_type} tensors",)
    return _gpu_reasons(traits) if traits.device_type == "cuda" else ()


def _gpu_reasons(traits: Traits) -> tuple[str, ...]:
    reasons = []
    if traits.dtype not in _GPU_DTYPES:
        reasons.append(f"its GPU kernels take bf16 and fp16, q is {traits.dtype}")
    largest = max(traits.head_dim, traits.value_head_dim)
    if largest > _GPU_MAX_HEAD_DIM:
        reasons.append(f"its GPU kernels take head dims up to {_GPU_MAX_HEAD_DIM}, not {largest}")
    return tuple(reasons)


def attention_forward(block: Block, state: State) -> None:
    torch.ops.usp.attention_forward(
        block.q, block.k, block.v, *block.options, state.out, state.lse, state.result
    )


def delta(dout: Tensor, out: Tensor) -> Tensor:
    batch, num_rows, num_heads = out.shape[:3]
    result = out.new_empty((batch, num_heads, num_rows), dtype=state_dtype(out.dtype))
    torch.ops.usp.attention_delta(dout, out, result)
    return result


def attention_once(block: Block) -> tuple[Tensor, Tensor]:
    found = torch.ops.usp.attention_once.default(block.q, block.k, block.v, *_of_once(block))
    return cast("tuple[Tensor, Tensor]", found)


def attention_once_backward(
    block: Block, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    found = torch.ops.usp.attention_once_backward.default(
        dout, dlse, block.q, block.k, block.v, out, lse, *_of_once(block)
    )
    return cast("tuple[Tensor, Tensor, Tensor]", found)


def _of_once(block: Block) -> tuple[Any, ...]:
    heads, scoring = block.heads, block.scoring
    ends = block.span or (None, None)
    return *ends, heads.offset, heads.group_size, scoring.softmax_scale, scoring.softcap


def attention_backward(block: Block, saved: Saved, grads: Gradients) -> None:
    torch.ops.usp.attention_backward(
        saved.dout,
        block.q,
        block.k,
        block.v,
        saved.delta,
        saved.lse,
        *block.options,
        grads.dq,
        grads.dk,
        grads.dv,
        grads.dbias,
        grads.overwrite,
    )
