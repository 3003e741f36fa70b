"""dk and dv: a program owns a tile of keys and goes through the rows that see them.

B batch, Lq / Lk rows of queries / keys, H query heads, G key heads, D head dim, Dv that of v.

Source: FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

import triton
import triton.language as tl

from usp.kernels.scores import gradient_of_scores, of_rows, weights
from usp.kernels.tiles import base, load_tile, program, ranges, store_tile


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def keys_kernel(
    dout,
    q,
    k,
    v,
    vectors,
    sizes,
    seen_by,
    scoring,
    seed_low,
    seed_high,
    dk,
    dv,
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
    k_len = sizes.k_len
    b, g, start = _place(sizes, k_len, BLOCK_K, NUM_XCDS)
    begin, full_begin, full_end, resume, end = ranges(
        seen_by, start, k_len, sizes.q_len, BLOCK_K, BLOCK_Q, EDGE
    )
    if begin < end:
        k_tile = load_tile(
            base(k, b, g), _row(k, WIDE), start, k_len, BLOCK_K, D, BLOCK_D, True, WIDE
        )
        v_tile = load_tile(
            base(v, b, g), _row(v, WIDE), start, k_len, BLOCK_K, DV, BLOCK_DV, True, WIDE
        )
        # what is held is loaded first: at the end registers are scarce
        dk_sum = load_tile(
            base(dk, b, g), _row(dk, WIDE), start, k_len, BLOCK_K, D, BLOCK_D, True, WIDE
        )
        dv_sum = load_tile(
            base(dv, b, g), _row(dv, WIDE), start, k_len, BLOCK_K, DV, BLOCK_DV, True, WIDE
        )
        dk_sum *= scales[1]
        # the query heads here that read this key head
        h_begin = tl.maximum(g * sizes.group - sizes.shift, 0)
        heads = 1
        if sizes.group != 1:
            heads = tl.minimum((g + 1) * sizes.group - sizes.shift, sizes.num_heads) - h_begin
        rows = (q, dout, vectors, b, h_begin, heads, sizes.q_len)
        held = (k_tile, v_tile, start, k_len, seen_by, scoring, (seed_low, seed_high))
        dk_sum, dv_sum = _visit_rows(
            dk_sum, dv_sum, begin, full_begin, rows, held,
            D, BLOCK_D, DV, BLOCK_DV, EDGE, BLOCK_K, True, WIDE,
        )  # fmt: skip
        dk_sum, dv_sum = _visit_rows(
            dk_sum, dv_sum, full_begin, full_end, rows, held,
            D, BLOCK_D, DV, BLOCK_DV, BLOCK_Q, BLOCK_K, False, WIDE,
        )  # fmt: skip
        dk_sum, dv_sum = _visit_rows(
            dk_sum, dv_sum, resume, end, rows, held,
            D, BLOCK_D, DV, BLOCK_DV, EDGE, BLOCK_K, True, WIDE,
        )  # fmt: skip
        dk_sum *= scales[0]
        # the grid has one dim, which the compiler cannot know: nothing of this waits in registers
        b, g, start = _place(sizes, k_len + tl.program_id(1), BLOCK_K, NUM_XCDS)
        store_tile(base(dk, b, g), _row(dk, WIDE), start, k_len, dk_sum, BLOCK_K, D, BLOCK_D, WIDE)
        store_tile(
            base(dv, b, g), _row(dv, WIDE), start, k_len, dv_sum, BLOCK_K, DV, BLOCK_DV, WIDE
        )


@triton.jit
def _row(x, WIDE: tl.constexpr):
    """Stride of rows, unsigned: the upper half of a signed offset takes a register of its own."""
    row = x.row
    if not WIDE:
        row = tl.cast(row, tl.uint32)
    return row


@triton.jit
def _place(sizes, k_len, BLOCK_K: tl.constexpr, NUM_XCDS: tl.constexpr):
    """Batch entry, key head and first key of this program."""
    tile, sequence = program(tl.cdiv(k_len, BLOCK_K), sizes.together, NUM_XCDS, KEYS=True)
    return sequence // sizes.num_kv_heads, sequence % sizes.num_kv_heads, tile * BLOCK_K


@triton.jit
def _visit_rows(
    dk_sum,
    dv_sum,
    begin,
    end,
    rows,
    held,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add what rows ``[begin, end)`` of all heads of a group give to a tile of keys.

    Scores are taken transposed, keys by rows: they enter both products without a transpose.
    Heads and rows are one loop, so that loads run ahead from head to head.
    """
    q, dout, vectors, b, h_begin, heads, q_len = rows
    k_tile, v_tile, start, k_len, seen_by, scoring, random = held
    q_row = _row(q, WIDE)
    dout_row = _row(dout, WIDE)
    j = start + tl.arange(0, BLOCK_K)
    j_in = j < k_len
    if MASKED and seen_by is not None:
        first = tl.load(seen_by.first + j, mask=j_in, other=0)
        stop = tl.load(seen_by.stop + j, mask=j_in, other=0)
    for visit in range(tl.cdiv(end - begin, BLOCK_Q) * heads):
        h = h_begin + visit % heads
        m = begin + visit // heads * BLOCK_Q
        i = m + tl.arange(0, BLOCK_Q)
        i_in = i < q_len
        q_tile = load_tile(base(q, b, h), q_row, m, q_len, BLOCK_Q, D, BLOCK_D, MASKED, WIDE)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        lse, delta = of_rows(vectors, b, h, i, i_in, MASKED)
        at = (i[None, :], j[:, None], i_in[None, :], j_in[:, None], b, h)
        p, slope = weights(s, lse[None, :], at, scoring)
        if MASKED:
            if seen_by is None:
                visible = i_in[None, :] & j_in[:, None]
            else:
                visible = (i[None, :] >= first[:, None]) & (i[None, :] < stop[:, None])
            p = tl.where(visible, p, 0.0)
        dout_tile = load_tile(
            base(dout, b, h), dout_row, m, q_len, BLOCK_Q, DV, BLOCK_DV, MASKED, WIDE
        )
        dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
        dropped, ds = gradient_of_scores(p, dp, delta[None, :], at, scoring, random)
        dv_sum = tl.dot(dropped.to(dout_tile.dtype), dout_tile, dv_sum, input_precision="ieee")
        if scoring.softcap is not None:
            ds *= slope
        dk_sum = tl.dot(ds.to(q_tile.dtype), q_tile, dk_sum, input_precision="ieee")
    return dk_sum, dv_sum
