"""Random numbers that depend on positions alone: Philox-4x32-10 in plain torch.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def words(streams: Tensor, q_pos: Tensor, k_pos: Tensor, seed: int | Tensor) -> Tensor:
    """One 32-bit word for each (stream, query position, key position).

    Args:
        streams: int64, batch * num_heads + head.
        q_pos, k_pos: int64 global positions; all three are broadcast together.
        seed: 64-bit key, also as a tensor.

    Returns:
        int64 in [0, 2**32): word ``k_pos & 3`` at counter ``(k_pos >> 2, q_pos, streams, 0)``.
    """
    # a query may stand before the first key: its position wraps as in kernels
    counter = [k_pos >> 2, q_pos & _LOW, streams, torch.zeros_like(k_pos)]
    key: list[int | Tensor] = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(10):
        low0, high0 = _multiply(counter[0], _MULTIPLIERS[0])
        low1, high1 = _multiply(counter[2], _MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(k + w) & _LOW for k, w in zip(key, _WEYL, strict=True)]
    lane = k_pos & 3
    return torch.where(
        lane < 2,
        torch.where(lane == 0, counter[0], counter[1]),
        torch.where(lane == 2, counter[2], counter[3]),
    )


def dropout_factors(
    dropout_p: float, streams: Tensor, q_pos: Tensor, k_pos: Tensor, seed: int | Tensor
) -> Tensor:
    """What a weight is multiplied with: 0, or 1 / (1 - dropout_p); fp64.

    Args:
        dropout_p: Probability to drop, in [0, 1).
        streams, q_pos, k_pos, seed: As in ``words``.
    """
    keep = words(streams, q_pos, k_pos, seed) >= int(dropout_p * 2**32)
    return keep.double() / (1 - dropout_p)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of a product; int64 wraps, its bits are those of the true product."""
    product = a * b
    return product & _LOW, (product >> 32) & _LOW
