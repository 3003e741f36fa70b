"""Triton kernels of linear attention, for NVIDIA and AMD."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from usp import kernels
from usp.linear_attention.kernels import Kept, Tokens, Traits, of_groups

NAME = "triton"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reasons_against(traits: Traits) -> tuple[str, ...]:
    reasons = []
    against = kernels.reason_against(traits.device.type)
    if against is not None:
        reasons.append(against)
    if traits.dtype not in _DTYPES:
        reasons.append(f"its state is fp32, of fp32, bf16 or fp16 and not of {traits.dtype}")
    if traits.delta:
        reasons.append("it has no delta rule")
    return tuple(reasons)


def update(tokens: Tokens) -> tuple[Tensor, Kept]:
    q, k, v, g = tokens
    if not q.shape[1]:
        return q.new_zeros(tokens.state_shape, dtype=torch.float32), ()
    from usp.kernels.linear import launch

    with kernels.launch_guard(q):
        _, behind = launch.run_states(k, v, g, None, tokens.heads, last_alone=True)
    return behind, ()


def forward(
    tokens: Tokens, before: Tensor, kept: Kept, graded: bool
) -> tuple[Tensor, Tensor, Kept]:
    q, k, v, g = tokens
    out = q.new_empty((*q.shape[:2], tokens.heads, v.shape[3]))
    if not q.shape[1]:
        return out, before.clone(), (before[None],) if graded else ()
    from usp.kernels.linear import launch

    with kernels.launch_guard(q):
        states, behind = launch.run_states(k, v, g, before, tokens.heads)
        pairs = launch.run_pairs(q, k, g, tokens.heads) if _has_channels(g) else None
        launch.run_read(q, k, v, g, states, out, pairs=pairs)
    # states of all chunks are as much memory as q, k, v and out: they are computed again
    return out, behind, (before[None],) if graded else ()


def update_backward(tokens: Tokens, dout: Tensor) -> tuple[Tensor, Kept]:
    q, g = tokens.q, tokens.g
    if not q.shape[1]:
        return q.new_zeros(tokens.state_shape, dtype=torch.float32), ()
    from usp.kernels.linear import launch

    with kernels.launch_guard(q):
        _, before = launch.run_states(q, dout, g, None, tokens.heads, back=True, last_alone=True)
    return before, ()


def backward(
    tokens: Tokens, saved: Kept, dout: Tensor, behind: Tensor, kept: Kept, decays: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    if _has_channels(tokens.g) and tokens.q.shape[1]:
        return _of_channels(tokens, saved[0][0], dout, behind)
    q, k, v, g = tokens
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if not q.shape[1]:
        return dq, dk, dv, torch.zeros_like(g) if g is not None and decays else None, behind.clone()
    from usp.kernels.linear import launch

    before, dg = saved[0][0], None
    with kernels.launch_guard(q):
        states, _ = launch.run_states(k, v, g, before, tokens.heads)
        dstates, dbefore = launch.run_states(q, dout, g, behind, tokens.heads, back=True)
        launch.run_read(dout, v, k, g, states, dq, transposed=True)
        launch.run_read(v, dout, q, g, dstates, dk, transposed=True, back=True)
        launch.run_read(k, q, dout, g, dstates, dv, back=True)
        if g is not None and decays:
            found = launch.run_decay_gradient(q, k, v, dout, g, states, dstates)
            dg = found.transpose(1, 2).sum_to_size(g.shape)
    return dq, dk, dv, dg, dbefore


def _has_channels(g: Tensor | None) -> TypeGuard[Tensor]:
    return g is not None and g.dim() == 4


def _of_channels(
    tokens: Tokens, before: Tensor, dout: Tensor, behind: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Every gradient with a decay a channel: dq, dk and dg of each head are worked out together."""
    from usp.kernels.linear import launch

    q, k, v, g = tokens
    assert g is not None
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    with kernels.launch_guard(q):
        states, _ = launch.run_states(k, v, g, before, tokens.heads)
        dstates, dbefore = launch.run_states(q, dout, g, behind, tokens.heads, back=True)
        pairs = launch.run_pairs(q, k, g, tokens.heads)
        launch.run_read(k, q, dout, g, dstates, dv, pairs=pairs, back=True)
        dq, dk, dg = launch.run_channel_gradients(q, k, v, dout, g, states, dstates)
    of_q, of_k = of_groups(dq, q), of_groups(dk, k)
    return of_q, of_k, dv, dg.sum_to_size(g.shape), dbefore
