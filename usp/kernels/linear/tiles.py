"""Tiles of tokens and states, how much decays between tokens, and products of what was computed."""

from __future__ import annotations

import triton
import triton.language as tl

from usp.kernels.tiles import base, tile_pointers

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def tokens_tile(
    ptr,
    row,
    start,
    length,
    column,
    BLOCK: tl.constexpr,
    X: tl.constexpr,
    BLOCK_X: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(BLOCK, BLOCK_X) rows from ``start`` and channels from ``column`` on; zeros beyond."""
    at = tile_pointers(ptr + column, row, start, BLOCK, BLOCK_X, WIDE)
    inside = (start + tl.arange(0, BLOCK) < length)[:, None]
    if X % BLOCK_X != 0:
        inside = inside & (column + tl.arange(0, BLOCK_X) < X)[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def tokens_row(x, b, h, i, length, column, X: tl.constexpr, BLOCK_X: tl.constexpr):
    """(BLOCK_X,) fp32 of token i, channels from ``column`` on; zeros beyond."""
    channels = column + tl.arange(0, BLOCK_X)
    at = base(x, b, h) + tl.cast(i, tl.int64) * x.row + channels
    there = tl.where(i < length, X, 0)
    return tl.load(at, mask=channels < there, other=0.0).to(tl.float32)


@triton.jit
def state_pointers(ptr, x, x_stride, e, e_stride, BLOCK_X: tl.constexpr, BLOCK_E: tl.constexpr):
    """Pointers to a tile of a state: channels from x and from e on."""
    x = x + tl.arange(0, BLOCK_X)
    e = e + tl.arange(0, BLOCK_E)
    return ptr + (x[:, None] * x_stride + e[None, :] * e_stride)


@triton.jit
def inside_state(
    x,
    e,
    X: tl.constexpr,
    BLOCK_X: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Which channels of a tile there are."""
    return (x + tl.arange(0, BLOCK_X) < X)[:, None] & (e + tl.arange(0, BLOCK_E) < E)[None, :]


@triton.jit
def logs(g, b, h, start, length, CHUNK: tl.constexpr, BEHIND: tl.constexpr):
    """Logs to base 2 of the decay of each token of a chunk, or of the one behind it; none is 0."""
    i = tl.arange(0, CHUNK) + BEHIND
    inside = (i < CHUNK) & (start + i < length)
    at = base(g, b, h) + (start + i).to(tl.int64) * g.row
    return tl.load(at, mask=inside, other=0.0) * LOG2E


@triton.jit
def carried(g, b, h, start, length, CHUNK: tl.constexpr, TO_END: tl.constexpr):
    """(CHUNK,) the decay behind each token up to the end of its chunk, or from before the chunk up
    to each token."""
    # sums of what lies between, never differences: one of -inf forgets all that was before
    if TO_END:
        sums = tl.cumsum(logs(g, b, h, start, length, CHUNK, 1), 0, reverse=True)
    else:
        sums = tl.cumsum(logs(g, b, h, start, length, CHUNK, 0), 0)
    return tl.exp2(sums)


@triton.jit
def logs_tile(
    g,
    b,
    h,
    start,
    length,
    column,
    BLOCK: tl.constexpr,
    X: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BEHIND: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(BLOCK, BLOCK_X) logs to base 2 of a decay a channel, of each token or the one behind it."""
    i = tl.arange(0, BLOCK) + BEHIND
    inside = ((i < BLOCK) & (start + i < length))[:, None]
    inside = inside & (column + tl.arange(0, BLOCK_X) < X)[None, :]
    at = tile_pointers(base(g, b, h) + column, g.row, start + BEHIND, BLOCK, BLOCK_X, WIDE)
    return tl.load(at, mask=inside, other=0.0) * LOG2E


@triton.jit
def carried_tile(
    g,
    b,
    h,
    start,
    length,
    column,
    CHUNK: tl.constexpr,
    X: tl.constexpr,
    BLOCK_X: tl.constexpr,
    TO_END: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(CHUNK, BLOCK_X) what ``carried`` is, of a decay a channel; of a chunk or a half of one."""
    logs = logs_tile(g, b, h, start, length, column, CHUNK, X, BLOCK_X, TO_END, WIDE)
    return tl.exp2(tl.cumsum(logs, 0, reverse=TO_END))


@triton.jit
def between(g, b, h, start, length, CHUNK: tl.constexpr, BACK: tl.constexpr):
    """(CHUNK, CHUNK) the decay from token j to a later i at [i, j]; with BACK at [j, i]."""
    x = logs(g, b, h, start, length, CHUNK, 0)
    row = tl.arange(0, CHUNK)[:, None]
    column = tl.arange(0, CHUNK)[None, :]
    if BACK:
        return tl.exp2(tl.cumsum(tl.where(column > row, x[None, :], 0.0), 1))
    return tl.exp2(tl.cumsum(tl.where(row > column, x[:, None], 0.0), 0))


@triton.jit
def seen(scores, g, b, h, start, length, CHUNK: tl.constexpr, BACK: tl.constexpr):
    """Scores of tokens with themselves and those before them, or with BACK behind them, times what
    decays between; 0 of others."""
    row = tl.arange(0, CHUNK)[:, None]
    column = tl.arange(0, CHUNK)[None, :]
    if g is not None:
        scores = scores * between(g, b, h, start, length, CHUNK, BACK)
    return tl.where((column >= row) if BACK else (row >= column), scores, 0.0)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``, where one was computed: both in bf16, or in fp32 multiplied so.

    Computed numbers may pass what fp16 can hold; tf32 holds them, and fp16 to the bit.
    """
    if PRECISION is None:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc, input_precision="ieee")
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
