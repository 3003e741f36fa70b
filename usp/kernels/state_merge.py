"""A library's partial result into the running softmax, in place and in one pass.

``ops/merge.py`` has the formula, and the differentiable way.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from usp.kernels.arguments import TensorView, cdiv, padded, view_of
from usp.kernels.tiles import base, rows_of_head

_BLOCK_ELEMENTS = 4096


def merge_into(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    """Join the softmax over two disjoint sets of keys into ``out`` and ``lse``.

    Args:
        out: (B, L, H, Dv) fp32. lse: (B, H, L) fp32. Updated.
        more_out, more_lse: The same shapes, any floating dtype. Last dims contiguous everywhere.
    """
    batch, length, num_heads, width = out.shape
    if not out.numel():
        return
    block = max(1, _BLOCK_ELEMENTS // padded(width))
    merge_kernel[(cdiv(length, block) * batch * num_heads,)](
        view_of(out),
        _vectors(lse),
        view_of(more_out),
        _vectors(more_lse),
        length,
        num_heads,
        DV=width,
        BLOCK_DV=padded(width),
        BLOCK=block,
        num_warps=4,
    )


def _vectors(lse: Tensor) -> TensorView:
    return TensorView(lse, lse.stride(0), lse.stride(2), lse.stride(1))


@triton.jit
def merge_kernel(
    out,
    lse,
    more_out,
    more_lse,
    length,
    num_heads,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, h, i, i_in = rows_of_head(length, num_heads, BLOCK)
    lse_at = base(lse, b, h) + i * lse.row
    held = tl.load(lse_at, mask=i_in, other=float("-inf"))
    more = tl.load(base(more_lse, b, h) + i * more_lse.row, mask=i_in, other=float("-inf"))
    more = more.to(tl.float32)
    top = tl.maximum(held, more)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(held - top)
    more_weight = tl.exp(more - top)
    total = weight + more_weight
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    x = tl.arange(0, BLOCK_DV)
    inside = i_in[:, None] & (x < DV)[None, :]
    out_at = base(out, b, h) + i[:, None] * out.row + x[None, :]
    more_at = base(more_out, b, h) + i[:, None] * more_out.row + x[None, :]
    joined = (weight / total)[:, None] * tl.load(out_at, mask=inside, other=0.0)
    # what a row that saw nothing holds may be anything
    fresh = tl.load(more_at, mask=inside & (more_weight > 0)[:, None], other=0.0).to(tl.float32)
    joined += (more_weight / total)[:, None] * fresh
    tl.store(out_at, joined, mask=inside)
    tl.store(lse_at, tl.where(seen, top + tl.log(total), float("-inf")), mask=i_in)
