"""Results inside of larger memory, whose rest must stay as it is."""

from __future__ import annotations

import torch
from torch import Tensor

GUARD = 12345.0


def guarded(
    shape: torch.Size, value: float, dtype: torch.dtype = torch.float32, margin: int = 4096
) -> tuple[Tensor, Tensor]:
    """A tensor full of a value, and what it lies in the middle of."""
    count = torch.Size(shape).numel()
    around = torch.full((count + 2 * margin,), GUARD, dtype=dtype)
    inside = around[margin : margin + count].view(shape)
    inside.fill_(value)
    return inside, around


def assert_untouched(around: Tensor, inside: Tensor) -> None:
    """Nothing but what lies inside was written."""
    guard = torch.tensor(GUARD, dtype=around.dtype)
    assert (around == guard).sum() == around.numel() - inside.numel()
