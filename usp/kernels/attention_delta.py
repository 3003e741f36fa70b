"""delta: what every block's backward subtracts, once for the whole pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from usp.kernels.arguments import cdiv, padded, view_of
from usp.kernels.tiles import base, rows_of_head

_BLOCK_ELEMENTS = 4096


def attention_delta(dout: Tensor, out: Tensor) -> Tensor:
    """Sums of ``dout * out`` over the last dim.

    Args:
        dout, out: (B, L, H, Dv), any floating dtype, last dim contiguous.

    Returns:
        (B, H, L) fp32.
    """
    batch, length, num_heads, _ = out.shape
    delta = out.new_empty((batch, num_heads, length), dtype=torch.float32)
    if delta.numel():
        launch_delta(dout, out, delta)
    return delta


def launch_delta(dout: Tensor, out: Tensor, delta: Tensor) -> None:
    """The same into ``delta``, which has at least one element and is contiguous."""
    batch, length, num_heads, width = out.shape
    block = max(1, _BLOCK_ELEMENTS // padded(width))
    delta_kernel[(cdiv(length, block) * batch * num_heads,)](
        view_of(dout),
        view_of(out),
        delta,
        length,
        num_heads,
        DV=width,
        BLOCK_DV=padded(width),
        BLOCK=block,
        num_warps=4,
    )


@triton.jit
def delta_kernel(
    dout,
    out,
    delta,
    length,
    num_heads,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, h, i, i_in = rows_of_head(length, num_heads, BLOCK)
    x = tl.arange(0, BLOCK_DV)
    inside = i_in[:, None] & (x < DV)[None, :]
    one = tl.load(base(dout, b, h) + i[:, None] * dout.row + x[None, :], mask=inside, other=0.0)
    other = tl.load(base(out, b, h) + i[:, None] * out.row + x[None, :], mask=inside, other=0.0)
    sums = tl.sum(one.to(tl.float32) * other.to(tl.float32), 1)
    at = delta + (tl.cast(b, tl.int64) * num_heads + h) * length + i
    tl.store(at, sums, mask=i_in)
