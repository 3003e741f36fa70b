"""Scores of the tokens of a chunk where each key channel has a decay of its own.

A chunk comes in two halves. The later sees the earlier through the seam between them: its queries
decay since the seam, keys of the earlier up to it, and what is left is a product. Tokens of a half
see each other pair by pair. Logs are added up over the tokens between two others, never subtracted.

Source: secondary chunks arXiv:2312.06635 (GLA, section 4.3).
"""

from __future__ import annotations

import triton
import triton.language as tl

from usp.kernels.linear.tiles import LOG2E, carried_tile, product, tokens_row, tokens_tile
from usp.kernels.tiles import base, program


@triton.jit
def with_pairs(
    scores,
    q_tile,
    k,
    g,
    b,
    h,
    k_head,
    first,
    length,
    d,
    HALF: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``scores`` (HALF, HALF) and what channels from d on add to those of a half with itself."""
    row = tl.arange(0, HALF)[:, None]
    column = tl.arange(0, HALF)[None, :]
    between = tl.zeros([HALF, BLOCK_D], tl.float32)  # logs behind j, up to each token
    for n in range(HALF):
        j = HALF - 1 - n
        key = tokens_row(k, b, k_head, first + j, length, d, D, BLOCK_D)
        log = tokens_row(g, b, h, first + j, length, d, D, BLOCK_D)
        found = tl.sum(q_tile * tl.exp2(between) * key[None, :], 1)
        scores += tl.where((column == j) & (row >= j), found[:, None], 0.0)
        between += tl.where(row >= j, log[None, :] * LOG2E, 0.0)
    return scores


@triton.jit
def pairs_kernel(
    q,
    k,
    g,
    pairs,
    sizes,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    NUM_XCDS: tl.constexpr,
):
    """
    Args:
        q, k: (B, L, ., D). g: (B | 1, L, H | 1, D).
        pairs: (B, H, n, CHUNK, CHUNK), written: what token i sees of j at [i, j], 0 behind it.
    """
    HALF: tl.constexpr = CHUNK // 2
    chunk, sequence = program(sizes.chunks, None, NUM_XCDS, KEYS=True)
    b = sequence // sizes.heads
    h = sequence % sizes.heads
    k_head = h // sizes.y_group
    start = chunk * CHUNK
    seam = start + HALF
    q_ptr = base(q, b, h // sizes.x_group)
    k_ptr = base(k, b, k_head)
    earlier = tl.zeros([HALF, HALF], tl.float32)
    later = tl.zeros([HALF, HALF], tl.float32)
    across = tl.zeros([HALF, HALF], tl.float32)
    for d in range(0, D, BLOCK_D):
        q_tile = tokens_tile(q_ptr, q.row, start, sizes.length, d, HALF, D, BLOCK_D, WIDE)
        earlier = with_pairs(
            earlier, q_tile.to(tl.float32), k, g, b, h, k_head, start, sizes.length, d,
            HALF, D, BLOCK_D,
        )  # fmt: skip
        q_tile = tokens_tile(q_ptr, q.row, seam, sizes.length, d, HALF, D, BLOCK_D, WIDE)
        q_tile = q_tile.to(tl.float32)
        later = with_pairs(
            later, q_tile, k, g, b, h, k_head, seam, sizes.length, d, HALF, D, BLOCK_D
        )
        k_tile = tokens_tile(k_ptr, k.row, start, sizes.length, d, HALF, D, BLOCK_D, WIDE)
        q_tile *= carried_tile(g, b, h, seam, sizes.length, d, HALF, D, BLOCK_D, False, WIDE)
        k_tile = k_tile.to(tl.float32) * carried_tile(
            g, b, h, start, sizes.length, d, HALF, D, BLOCK_D, True, WIDE
        )
        across = product(q_tile, tl.trans(k_tile), across, PRECISION)
    place = (tl.cast(sequence, tl.int64) * sizes.chunks + chunk) * (CHUNK * CHUNK)
    at = pairs + place + (tl.arange(0, HALF)[:, None] * CHUNK + tl.arange(0, HALF)[None, :])
    dtype = pairs.dtype.element_ty
    tl.store(at, earlier.to(dtype))
    tl.store(at + HALF, tl.zeros([HALF, HALF], dtype))
    tl.store(at + HALF * CHUNK, across.to(dtype))
    tl.store(at + HALF * CHUNK + HALF, later.to(dtype))
