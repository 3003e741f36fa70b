"""Libraries' attention with its LSE, forward and backward, as a ring calls it.

q, k, v, out, dout are (B, L, H, D), lse is (B, H, L) fp32. ``kept`` is whatever else a backward
wants of its forward. A backward takes the out and lse of the whole pass, not of one block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from usp.ops.merge import merge_into
from usp.planning.problem import State

aten = torch.ops.aten
Partial = tuple[Tensor, Tensor, tuple[Any, ...]]
Gradients = tuple[Tensor, ...]
Merge = Callable[[State, Tensor, Tensor], None]


@dataclass(frozen=True)
class Library:
    """``forward(q, k, v, causal)``; ``backward(dout, q, k, v, out, lse, causal, kept)``."""

    forward: Callable[[Tensor, Tensor, Tensor, bool], Partial]
    backward: Callable[..., Gradients]


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Partial:
    """torch's FlashAttention-2."""
    found = aten._scaled_dot_product_flash_attention(*heads_first(q, k, v), 0.0, causal)
    return found[0].transpose(1, 2), found[1], tuple(found[2:8])


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, kept: Any
) -> Gradients:
    cum_q, cum_k, max_q, max_k, seed, offset = kept
    grads = aten._scaled_dot_product_flash_attention_backward(
        *heads_first(dout, q, k, v, out), lse, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset
    )
    return tuple(heads_first(*grads))


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Partial:
    """cuDNN's, whose LSE has one dim more."""
    found = aten._scaled_dot_product_cudnn_attention(*heads_first(q, k, v), None, True, 0.0, causal)
    return found[0].transpose(1, 2), found[1].reshape(heads_first(q)[0].shape[:3]), found[2:8]


def cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, kept: Any
) -> Gradients:
    cum_q, cum_k, max_q, max_k, seed, offset = kept
    no_bias = None  # an empty tensor would be taken for one
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        *heads_first(dout, q, k, v, out), lse[..., None], seed, offset, no_bias,
        cum_q, cum_k, max_q, max_k, 0.0, causal,
    )  # fmt: skip
    return tuple(heads_first(*grads))


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Partial:
    """torch's CPU kernel, for a dry run."""
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*heads_first(q, k, v), 0.0, causal)
    return out.transpose(1, 2), lse, ()


def cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, kept: Any
) -> Gradients:
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads_first(dout, q, k, v, out), lse, 0.0, causal
    )
    return tuple(heads_first(*grads))


FLASH, CUDNN = Library(flash_forward, flash_backward), Library(cudnn_forward, cudnn_backward)
CPU = Library(cpu_forward, cpu_backward)


def libraries(device: str) -> dict[str, Library]:
    return {"flash": FLASH, "cudnn": CUDNN} if device == "cuda" else {"cpu": CPU}


def eager_merge(state: State, out: Tensor, lse: Tensor) -> None:
    """The usual update, out - sigmoid(lse' - lse) (out - out'), in Python."""
    assert state.out is not None
    share = torch.sigmoid(lse - state.lse).transpose(1, 2)[..., None]
    state.out.sub_(share * (state.out - out.float()))
    state.lse.copy_(state.lse - torch.nn.functional.logsigmoid(state.lse - lse))


def fused_merge(state: State, out: Tensor, lse: Tensor) -> None:
    """usp's own merge kernel."""
    assert state.out is not None
    merge_into(state.out, state.lse, out, lse)


MERGES: dict[str, Merge] = {"Python merge": eager_merge, "fused merge": fused_merge}
