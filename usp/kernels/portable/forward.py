"""One block of keys into the running softmax, in one pass: the state is loaded and stored once.

B batch, Lq / Lk rows of queries / keys, H query heads, G key heads, D head dim, Dv that of v.

Source: FlashAttention-2, arXiv:2307.08691; online softmax, arXiv:1805.02867.
"""

from __future__ import annotations

import triton
import triton.language as tl

from usp.kernels.scores import added_to_scores, kept, tanh
from usp.kernels.tiles import base, load_tile, program, ranges, store_tile

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    lse_batch,
    lse_head,
    result,
    sizes,
    span,
    scoring,
    seed_low,
    seed_high,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    FOLDED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EDGE: tl.constexpr,
    NUM_XCDS: tl.constexpr,
):
    tile, sequence = program(tl.cdiv(sizes.q_len, BLOCK_Q), sizes.together, NUM_XCDS)
    b = sequence // sizes.num_heads
    h = sequence % sizes.num_heads
    start = tile * BLOCK_Q
    i = start + tl.arange(0, BLOCK_Q)
    i_in = i < sizes.q_len
    begin, full_begin, full_end, resume, end = ranges(
        span, start, sizes.q_len, sizes.k_len, BLOCK_Q, BLOCK_K, EDGE
    )
    if begin < end:
        q_tile = load_tile(
            base(q, b, h), q.row, start, sizes.q_len, BLOCK_Q, D, BLOCK_D, True, WIDE
        )
        lse_at = lse + tl.cast(b, tl.int64) * lse_batch + tl.cast(h, tl.int64) * lse_head + i
        held = tl.load(lse_at, mask=i_in, other=0.0)
        top = held * LOG2E
        total = tl.full([BLOCK_Q], 1.0, tl.float32)
        acc = _held(out, b, h, start, sizes.q_len, BLOCK_Q, DV, BLOCK_DV, WIDE)
        g = (h + sizes.shift) // sizes.group
        keys = (base(k, b, g), k.row, base(v, b, g), v.row)
        where = (b, h, i, i_in, sizes.k_len, span)
        random = (seed_low, seed_high)
        # edge, full, edge: one body, masked or not
        acc, top, total = _visit(
            acc, top, total, q_tile, keys, begin, full_begin, where, scoring, random,
            D, BLOCK_D, DV, BLOCK_DV, EDGE, True, FOLDED, WIDE,
        )  # fmt: skip
        acc, top, total = _visit(
            acc, top, total, q_tile, keys, full_begin, full_end, where, scoring, random,
            D, BLOCK_D, DV, BLOCK_DV, BLOCK_K, False, FOLDED, WIDE,
        )  # fmt: skip
        acc, top, total = _visit(
            acc, top, total, q_tile, keys, resume, end, where, scoring, random,
            D, BLOCK_D, DV, BLOCK_DV, EDGE, True, FOLDED, WIDE,
        )  # fmt: skip
        total = tl.where(total == 0, 1.0, total)
        acc = acc * (1.0 / total)[:, None]
        _put(out, result, acc, b, h, start, sizes.q_len, BLOCK_Q, DV, BLOCK_DV, WIDE)
        # what saw nothing keeps its lse to the bit
        same = (total == 1) & (top == held * LOG2E)
        tl.store(lse_at, tl.where(same, held, (top + tl.log2(total)) * LN2), mask=i_in)
    elif result is not None:
        acc = _held(out, b, h, start, sizes.q_len, BLOCK_Q, DV, BLOCK_DV, WIDE)
        _put(out, result, acc, b, h, start, sizes.q_len, BLOCK_Q, DV, BLOCK_DV, WIDE)


@triton.jit
def _held(
    out,
    b,
    h,
    start,
    length,
    BLOCK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What the state holds of a tile of rows."""
    if out is None:
        tile = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    else:
        tile = load_tile(base(out, b, h), out.row, start, length, BLOCK, DV, BLOCK_DV, True, WIDE)
    return tile


@triton.jit
def _put(
    out,
    result,
    tile,
    b,
    h,
    start,
    length,
    BLOCK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Store a tile of rows: into the result in its dtype where there is one, else the state."""
    if result is None:
        store_tile(base(out, b, h), out.row, start, length, tile, BLOCK, DV, BLOCK_DV, WIDE)
    else:
        tile = tile.to(result.ptr.dtype.element_ty)
        store_tile(base(result, b, h), result.row, start, length, tile, BLOCK, DV, BLOCK_DV, WIDE)


@triton.jit
def _visit(
    acc,
    top,
    total,
    q_tile,
    keys,
    begin,
    end,
    where,
    scoring,
    random,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    FOLDED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Let keys ``[begin, end)`` into the accumulator, its maximum and its sum."""
    k_ptr, k_row, v_ptr, v_row = keys
    b, h, i, i_in, k_len, span = where
    # a row may still see nothing: its maximum -inf must not meet itself
    HIDING: tl.constexpr = MASKED or scoring.bias is not None
    if MASKED and span is not None:
        first = tl.load(span.first + i, mask=i_in, other=0)
        stop = tl.load(span.stop + i, mask=i_in, other=0)
    for n in range(begin, end, BLOCK_K):
        k_tile = load_tile(k_ptr, k_row, n, k_len, BLOCK_K, D, BLOCK_D, MASKED, WIDE)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        j = n + tl.arange(0, BLOCK_K)
        j_in = j < k_len
        at = (i[:, None], j[None, :], i_in[:, None], j_in[None, :], b, h)
        if not FOLDED:
            s = s * scoring.scale
            if scoring.softcap is not None:
                s = tanh(s) * scoring.softcap
            s = added_to_scores(s, at, scoring)
        if MASKED:
            if span is None:
                visible = j_in[None, :]
            else:
                visible = (j[None, :] >= first[:, None]) & (j[None, :] < stop[:, None])
            s = tl.where(visible, s, float("-inf"))
        if FOLDED:
            higher = tl.maximum(top, tl.max(s, 1) * scoring.scale)
        else:
            higher = tl.maximum(top, tl.max(s, 1))
        level = higher
        if HIDING:
            level = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s * scoring.scale - level[:, None]) if FOLDED else tl.exp2(s - level[:, None])
        shrink = tl.exp2(top - level)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        if scoring.dropout is not None:
            p *= kept(at, scoring, random)
        v_tile = load_tile(v_ptr, v_row, n, k_len, BLOCK_K, DV, BLOCK_DV, MASKED, WIDE)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        top = higher
    return acc, top, total
