"""Attention and its gradients in fp64 at a few positions of a long sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def sampled_positions(length: int, count: int) -> Tensor:
    """Both ends, and positions spread at random between them; ascending."""
    generator = torch.Generator().manual_seed(1)
    inside = torch.randperm(length, generator=generator)[:count]
    return torch.cat([inside, torch.tensor([0, length - 1])]).unique()


def exact_rows(leaves: list[Tensor], dout: Tensor, positions: Tensor, causal: bool) -> list[Tensor]:
    """out, dq, dk and dv at ``positions``: (B, H, positions, D) each, fp64.

    torch's attention in fp64 gives lse and out of every row, from which a gradient at one
    position takes a single row or column of the scores.

    Args:
        leaves: q, k, v (B, H, S, D).
        dout: (B, H, S, D), the gradient of out.
        positions: (n,) int64.
        causal: Whether query i sees keys up to i only.
    """
    q, k, v, dout = (x.detach().double() for x in (*leaves, dout))
    scale, every = q.shape[-1] ** -0.5, torch.arange(q.shape[2])
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, k, v, 0.0, causal)
    delta = (dout * out).sum(-1)

    def weights(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and gradients of the scores, (B, H, queries, keys)."""
        scores = scale * q[:, :, queries] @ k[:, :, keys].mT
        if causal:
            scores = scores.masked_fill(keys > queries[:, None], -torch.inf)
        p = torch.exp(scores - lse[:, :, queries, None])
        dp = dout[:, :, queries] @ v[:, :, keys].mT
        return p, scale * p * (dp - delta[:, :, queries, None])

    p, ds = weights(positions, every)
    rows = [p @ v, ds @ k]
    p, ds = weights(every, positions)
    return [*rows, ds.mT @ q, p.mT @ dout]
