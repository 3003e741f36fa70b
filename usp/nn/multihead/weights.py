"""The rows of attention weights that ``need_weights=True`` asks for.

Attention itself never forms them. Here each rank computes the rows of its own queries against the
keys of all ranks, dense and differentiable: for looking at, not for long sequences.

Shape letters: N batch, L local queries, S all keys, H heads, D head dim, E extra keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usp.attention import levels
from usp.ops.precision import einsum
from usp.planning.problem import state_dtype

# of the scores alone; softmax, dropout and autograd hold a few tensors of that size
MAX_BYTES = 2 << 30


def check_size(
    batch: int, num_heads: int, query_len: int, key_len: int, dtype: torch.dtype
) -> None:
    """Refuse weights that nobody has room for.

    Args:
        query_len: Rows of the rank that holds most, so that all ranks decide alike.

    Raises:
        NotImplementedError: names the size and the bound.
    """
    size = batch * num_heads * query_len * key_len * dtype.itemsize
    if size > MAX_BYTES:
        raise NotImplementedError(
            f"need_weights=True: a batch of {batch}, {num_heads} heads, {query_len} local queries "
            f"and {key_len} keys make {size} bytes of weights on a rank, the bound is "
            f"{MAX_BYTES}: pass need_weights=False, or ask for the weights of fewer queries"
        )


def attention_weights(
    q: Tensor,
    k: Tensor,
    softmax_scale: float,
    visible: Tensor | None,
    bias: Tensor | None,
    extra_scores: Tensor | None,
) -> Tensor:
    """Softmax rows of ``q`` against every key.

    Args:
        q: (N, L, H, D) this rank's queries.
        k: (N, S, H, D) all keys in global order, dtype of q.
        softmax_scale: Factor of the scores, dimensionless.
        visible: (L, S) bool, True where a query sees a key; None for everywhere.
        bias: (N|1, H|1, L|1, S) added to the scaled scores; -inf hides.
        extra_scores: (N, H, L, E) of keys behind all tokens.

    Returns:
        (N, H, L, S + E) fp32 (fp64 for fp64 inputs); a row that sees nothing is 0.
    """
    dtype = state_dtype(q.dtype)
    scores = einsum("nlhd,nshd->nhls", q.to(dtype) * softmax_scale, k.to(dtype))
    if bias is not None:
        bias = bias.to(dtype)
        if visible is not None:
            bias = bias.masked_fill(~visible, -torch.inf)
        level = levels.of_rows(bias, extra_scores is not None)
        scores = scores + (bias - level)
        extra_scores = None if extra_scores is None else extra_scores - level
    elif visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if extra_scores is not None:
        scores = torch.cat((scores, extra_scores), -1)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
