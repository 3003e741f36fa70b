"""The oracle of linear attention: its recurrence, a token at a time; it imports nothing of usp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    causal: bool = True,
    cu_seqlens: Sequence[int] | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``S_t = diag(exp(decay_t)) S_{t-1} + k_t^T v_t``, ``o_t = q_t S_t`` in fp64, differentiable.

    The delta rule, with ``beta``, puts ``beta_t (v_t - k_t diag(exp(decay_t)) S_{t-1})`` in the
    place of ``v_t``.

    Args:
        q, k: (B, L, Hq | Hk, D), whole sequences. v: (B, L, Hv, Dv). H, the most of these, is a
            multiple of the others.
        decay: Logs: (H,), (B, L, H) or (B, L, H, D).
        beta: (B, L, H).
        causal: Else a token sees the state at the end of its document.
        cu_seqlens: Where documents begin, all but the first with an empty state.
        initial_state: (B, H, D, Dv).

    Returns:
        (B, L, H, Dv), and the last state (B, H, D, Dv).
    """
    q, k, v = (x.double() for x in (q, k, v))
    heads = max(x.shape[2] for x in (q, k, v))
    q, k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k, v))
    batch, length, _, dim = q.shape
    factors = torch.ones_like(q) if decay is None else decay.double().exp()
    if factors.dim() == 1:
        factors = factors.expand(batch, length, heads)
    if factors.dim() == 3:
        factors = factors[..., None].expand(batch, length, heads, dim)
    empty = q.new_zeros(batch, heads, dim, v.shape[3])
    state = empty if initial_state is None else initial_state.double()
    starts = set() if cu_seqlens is None else set(cu_seqlens[1:-1])
    states = []
    for t in range(length):
        before = empty if t in starts else factors[:, t, :, :, None] * state
        value = v[:, t]
        if beta is not None:
            expected = (k[:, t, :, :, None] * before).sum(-2)
            value = beta[:, t, :, None].double() * (value - expected)
        state = before + k[:, t, :, :, None] * value[:, :, None, :]
        states.append(state)
    if not causal:
        ends = [0, length] if cu_seqlens is None else list(cu_seqlens)
        states = [states[min(end for end in ends if end > t) - 1] for t in range(length)]
    out = [(q[:, t, :, :, None] * states[t]).sum(-2) for t in range(length)]
    return torch.stack(out, 1) if out else v, state
