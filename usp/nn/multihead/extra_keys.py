"""Keys that belong to no token: ``bias_k`` and the zero key of ``nn.MultiheadAttention``.

Every query sees them, on whatever rank it lives. Given to one rank as keys they would break the
layout, given to all they would count once for each. So attention over the tokens runs without
them, and each rank lets them into its own finished rows, which is exact because the rows come
with their log-sum-exp.

Shape letters: N batch, L local queries, H heads, D head dim, E extra keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from usp.ops.merge import merge
from usp.ops.precision import einsum
from usp.planning.problem import state_dtype


@dataclass(frozen=True, eq=False)
class ExtraKeys:
    """Keys and values seen by every query, behind all tokens.

    Attributes:
        k, v: (E, H, D) fp32, fp64 for fp64 inputs.
    """

    k: Tensor
    v: Tensor

    def scores(self, q: Tensor, softmax_scale: float) -> Tensor:
        """Scaled scores (N, H, L, E) of queries (N, L, H, D), in the dtype of ``k``."""
        return einsum("nlhd,ehd->nhle", q.to(self.k.dtype) * softmax_scale, self.k)

    def merge(self, out: Tensor, lse: Tensor, scores: Tensor, keep: Tensor | None) -> Tensor:
        """Let the extra keys into finished rows; differentiable in everything.

        Args:
            out: (N, L, H, D) attention over the tokens.
            lse: (N, H, L) natural log of the sum of exp(score) over the tokens, -inf for none.
            scores: (N, H, L, E) from ``scores``.
            keep: (N, H, L, E) dropout factors of the extra weights, or None.

        Returns:
            (N, L, H, D), dtype of ``out``.
        """
        weights = scores.softmax(-1)
        if keep is not None:
            weights = weights * keep
        extra = einsum("nhle,ehd->nlhd", weights, self.v)
        return merge(out, lse, extra, scores.logsumexp(-1))[0].to(out.dtype)


def make_extra_keys(
    bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, num_heads: int, q: Tensor
) -> ExtraKeys | None:
    """The extra keys of a module in torch's order, the bias before the zero key; None for none.

    Args:
        bias_k, bias_v: (1, 1, H * D) parameters, both or neither.
        add_zero_attn: Whether there is a key and a value of zeros.
        num_heads: H.
        q: The queries (N, L, H, D), for dtype, device and head dim.
    """
    dtype = state_dtype(q.dtype)
    k, v = [], []
    if bias_k is not None and bias_v is not None:
        k.append(bias_k.to(dtype).view(1, num_heads, -1))
        v.append(bias_v.to(dtype).view(1, num_heads, -1))
    if add_zero_attn:
        zero = torch.zeros(1, num_heads, q.shape[-1], dtype=dtype, device=q.device)
        k.append(zero)
        v.append(zero)
    return ExtraKeys(torch.cat(k), torch.cat(v)) if k else None
