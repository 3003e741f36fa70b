"""delta in plain torch, for backends without a kernel of their own for it."""

from __future__ import annotations

import torch
from torch import Tensor

# products in the dtype of the state that exist at a time
_AT_ONCE = 1 << 24


def row_products(dout: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of ``dout * out`` over the last dim, some rows at a time.

    Args:
        dout, out: (B, L, H, Dv).
        dtype: Of products and sums.

    Returns:
        (B, H, L), contiguous.
    """
    batch, length, num_heads, width = out.shape
    found = out.new_empty((batch, num_heads, length), dtype=dtype)
    step = max(1, _AT_ONCE // max(1, batch * num_heads * width))
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        products = dout[:, rows].to(dtype) * out[:, rows].to(dtype)
        found[:, :, rows] = products.sum(-1).transpose(1, 2)
    return found


def with_products(dout: Tensor, delta: Tensor) -> Tensor:
    """Rows whose products with those of ``dout`` are ``delta``: the shortest there are.

    Args:
        dout: (B, L, H, Dv).
        delta: (B, H, L).

    Returns:
        (B, L, H, Dv), dtype of delta; 0 where dout is.
    """
    wide = dout.to(delta.dtype)
    # by their largest, that no square is lost
    largest = wide.abs().amax(-1, keepdim=True) if wide.shape[-1] else wide.sum(-1, keepdim=True)
    unit = wide / torch.where(largest > 0, largest, 1)
    length = torch.where(largest > 0, largest * unit.square().sum(-1, keepdim=True), 1)
    return unit * (delta.transpose(1, 2)[..., None] / length)
