"""dq: a program owns a tile of rows and goes through the keys that they see.

B batch, Lq / Lk rows of queries / keys, H query heads, G key heads, D head dim, Dv that of v.

Source: FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

import triton
import triton.language as tl

from usp.kernels.scores import gradient_of_scores, of_rows, weights
from usp.kernels.tiles import base, load_tile, program, ranges, store_tile


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def queries_kernel(
    dout,
    q,
    k,
    v,
    vectors,
    sizes,
    span,
    scoring,
    seed_low,
    seed_high,
    dq,
    scales,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
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
    q_len = sizes.q_len
    begin, full_begin, full_end, resume, end = ranges(
        span, start, q_len, sizes.k_len, BLOCK_Q, BLOCK_K, EDGE
    )
    if begin < end:
        i = start + tl.arange(0, BLOCK_Q)
        lse, delta = of_rows(vectors, b, h, i, i < q_len, True)
        q_tile = load_tile(base(q, b, h), q.row, start, q_len, BLOCK_Q, D, BLOCK_D, True, WIDE)
        dout_tile = load_tile(
            base(dout, b, h), dout.row, start, q_len, BLOCK_Q, DV, BLOCK_DV, True, WIDE
        )
        dq_ptr = base(dq, b, h)
        dq_sum = load_tile(dq_ptr, dq.row, start, q_len, BLOCK_Q, D, BLOCK_D, True, WIDE)
        dq_sum *= scales[1]
        g = (h + sizes.shift) // sizes.group
        keys = (base(k, b, g), k.row, base(v, b, g), v.row, sizes.k_len)
        held = (q_tile, dout_tile, lse, delta, b, h, start, q_len, span, scoring)
        random = (seed_low, seed_high)
        dq_sum = _visit_keys(
            dq_sum, begin, full_begin, keys, held, random,
            D, BLOCK_D, DV, BLOCK_DV, BLOCK_Q, EDGE, True, WIDE,
        )  # fmt: skip
        dq_sum = _visit_keys(
            dq_sum, full_begin, full_end, keys, held, random,
            D, BLOCK_D, DV, BLOCK_DV, BLOCK_Q, BLOCK_K, False, WIDE,
        )  # fmt: skip
        dq_sum = _visit_keys(
            dq_sum, resume, end, keys, held, random,
            D, BLOCK_D, DV, BLOCK_DV, BLOCK_Q, EDGE, True, WIDE,
        )  # fmt: skip
        dq_sum *= scales[0]
        store_tile(dq_ptr, dq.row, start, q_len, dq_sum, BLOCK_Q, D, BLOCK_D, WIDE)


@triton.jit
def _visit_keys(
    dq_sum,
    begin,
    end,
    keys,
    held,
    random,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add what keys ``[begin, end)`` give to a tile of rows."""
    k_ptr, k_row, v_ptr, v_row, k_len = keys
    q_tile, dout_tile, lse, delta, b, h, start, q_len, span, scoring = held
    i = start + tl.arange(0, BLOCK_Q)
    i_in = i < q_len
    if MASKED and span is not None:
        first = tl.load(span.first + i, mask=i_in, other=0)
        stop = tl.load(span.stop + i, mask=i_in, other=0)
    for n in range(begin, end, BLOCK_K):
        j = n + tl.arange(0, BLOCK_K)
        j_in = j < k_len
        k_tile = load_tile(k_ptr, k_row, n, k_len, BLOCK_K, D, BLOCK_D, MASKED, WIDE)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        at = (i[:, None], j[None, :], i_in[:, None], j_in[None, :], b, h)
        p, slope = weights(s, lse[:, None], at, scoring)
        if MASKED:
            if span is None:
                visible = j_in[None, :]
            else:
                visible = (j[None, :] >= first[:, None]) & (j[None, :] < stop[:, None])
            p = tl.where(visible, p, 0.0)
        v_tile = load_tile(v_ptr, v_row, n, k_len, BLOCK_K, DV, BLOCK_DV, MASKED, WIDE)
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
        _, ds = gradient_of_scores(p, dp, delta[:, None], at, scoring, random)
        if scoring.softcap is not None:
            ds *= slope
        dq_sum = tl.dot(ds.to(k_tile.dtype), k_tile, dq_sum, input_precision="ieee")
    return dq_sum
