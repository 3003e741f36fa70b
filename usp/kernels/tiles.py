"""Pieces that all attention kernels share: program order, tiles of rows, ranges of a span.

B batch, L rows, H query heads, G key heads, X head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program(num_tiles, together, NUM_XCDS: tl.constexpr, KEYS: tl.constexpr = False):
    """Tile and sequence (batch and head) of this program.

    Hardware deals programs out over ``NUM_XCDS`` chiplets in turn: undo that, so that the tiles
    of one head share a chiplet's cache. The longest tiles of a causal mask come first: the last of
    queries, and where `KEYS` says so the first of keys; of one sequence, or of all that fit a
    cache ``together``, so that the last programs to start are short ones.

    Source:
        FlashAttention-3's order of tiles, hopper/tile_scheduler.hpp.
    """
    pid = tl.program_id(0)
    total = tl.num_programs(0)
    if NUM_XCDS > 1:
        whole = total // NUM_XCDS
        rest = total % NUM_XCDS
        xcd = pid % NUM_XCDS
        pid = xcd * whole + tl.minimum(xcd, rest) + pid // NUM_XCDS
    if together is None:
        tile = pid % num_tiles
        sequence = pid // num_tiles
    else:
        first = pid // (num_tiles * together) * together
        here = tl.minimum(together, total // num_tiles - first)
        inside = pid - first * num_tiles
        tile = inside // here
        sequence = first + inside % here
    if not KEYS:
        tile = num_tiles - 1 - tile
    return tile, sequence


@triton.jit
def rows_of_head(length, num_heads, BLOCK: tl.constexpr):
    """Batch entry, head and rows of this program, and which rows exist, where every row is alone.

    Heads are next to each other in memory: their programs run together.
    """
    pid = tl.program_id(0)
    h = pid % num_heads
    tiles = tl.cdiv(length, BLOCK)
    b = pid // num_heads // tiles
    i = pid // num_heads % tiles * BLOCK + tl.arange(0, BLOCK)
    return b, h, i.to(tl.int64), i < length


@triton.jit
def base(x, b, h):
    """Pointer to the first row of one head."""
    return x.ptr + tl.cast(b, tl.int64) * x.batch + tl.cast(h, tl.int64) * x.head


@triton.jit
def tile_pointers(ptr, row, start, BLOCK: tl.constexpr, BLOCK_X: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to rows from ``start`` on: a 64-bit scalar and small offsets."""
    i = tl.arange(0, BLOCK)
    if WIDE:
        i = i.to(tl.int64)
    return (
        ptr + tl.cast(start, tl.int64) * row + (i[:, None] * row + tl.arange(0, BLOCK_X)[None, :])
    )


@triton.jit
def load_tile(
    ptr,
    row,
    start,
    length,
    BLOCK: tl.constexpr,
    X: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BOUNDED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(BLOCK, BLOCK_X) rows from ``start`` on; zeros beyond the length (if BOUNDED) and X."""
    at = tile_pointers(ptr, row, start, BLOCK, BLOCK_X, WIDE)
    inside = (start + tl.arange(0, BLOCK) < length)[:, None]
    columns = (tl.arange(0, BLOCK_X) < X)[None, :]
    if BOUNDED and X != BLOCK_X:
        tile = tl.load(at, mask=inside & columns, other=0.0)
    elif BOUNDED:
        tile = tl.load(at, mask=inside, other=0.0)
    elif X != BLOCK_X:
        tile = tl.load(at, mask=columns, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_tile(
    ptr,
    row,
    start,
    length,
    tile,
    BLOCK: tl.constexpr,
    X: tl.constexpr,
    BLOCK_X: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Store a tile to rows from ``start`` on."""
    at = tile_pointers(ptr, row, start, BLOCK, BLOCK_X, WIDE)
    inside = (start + tl.arange(0, BLOCK) < length)[:, None]
    tl.store(at, tile, mask=inside & (tl.arange(0, BLOCK_X) < X)[None, :])


@triton.jit
def ranges(
    span,
    start,
    length,
    other_len,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    EDGE: tl.constexpr,
    lanes=None,
):
    """Where the rows of a tile look: three loops, edge, full, edge.

    The full one goes in steps of ``STEP``, the others of ``EDGE``, which divides it.

    Args:
        span: ``first, stop`` of each row, both non-decreasing; None where all see everything.
        start, length: First row of the tile, number of rows.
        other_len: How far spans may reach.
        lanes: ``arange(0, BLOCK)`` in a layout of the caller's.

    Returns:
        begin, full_begin, full_end, resume, end: ``[full_begin, full_end)`` needs no mask,
        ``[begin, full_begin)`` and ``[resume, end)`` do. Where the visible range has gaps (two
        chunks of a zigzag under a window), the widest one lies between the edges.
    """
    if span is None:
        begin = 0
        full_begin = 0
        full_end = other_len // STEP * STEP
        resume = full_end
        end = other_len
    else:
        last = tl.minimum(start + BLOCK, length) - 1
        begin = tl.load(span.first + start) // EDGE * EDGE
        end = tl.load(span.stop + last)
        full_begin = tl.cdiv(tl.load(span.first + last), STEP) * STEP
        full_end = tl.maximum(tl.load(span.stop + start) // STEP * STEP, full_begin)
        resume = full_end
        if full_begin == full_end:
            i = start + tl.arange(0, BLOCK) if lanes is None else start + lanes
            stop = tl.load(span.stop + i, mask=i < last, other=0)
            gap = tl.load(span.first + i + 1, mask=i < last, other=0) - stop
            widest = tl.max(gap, 0)
            if widest > EDGE:
                at = tl.min(tl.where(gap == widest, stop, other_len), 0)
                full_begin = tl.cdiv(at, EDGE) * EDGE
                full_end = full_begin
                resume = tl.maximum((at + widest) // EDGE * EDGE, full_begin)
        if full_begin > end:
            full_begin = end
            full_end = end
    return begin, full_begin, full_end, resume, end
