"""Gradient of the bias in its own shape, without atomics.

A program owns a tile of the gradient and goes through everything that is broadcast onto it:
sequences, heads and, for a bias with one row, all rows. The other backward kernels never see it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from usp.kernels import configs
from usp.kernels.arguments import (
    BackwardInputs,
    KernelOptions,
    KernelSpan,
    bias_view_of,
    cdiv,
    view_of,
)
from usp.kernels.choice import choose
from usp.kernels.scores import gradient_of_scores, of_rows, weights
from usp.kernels.tiles import base, load_tile


def bias_gradient(
    inputs: BackwardInputs, options: KernelOptions, seen_by: KernelSpan | None, dbias: Tensor
) -> None:
    """Add the gradient of the bias to ``dbias``, of its shape, fp32.

    Args:
        inputs, options, seen_by: As in ``attention_backward``.
    """
    q, k = inputs.q, inputs.k
    if not q.numel() or not k.numel():
        return
    batch, heads, rows, k_len = dbias.shape
    _, config = choose("bias_gradient", options, inputs.dout, q, k, inputs.v)
    row_tiles = cdiv(rows, config.block_q) if rows > 1 else 1
    bias_gradient_kernel[(cdiv(k_len, config.block_k) * row_tiles * batch * heads,)](
        *(view_of(x) for x in (inputs.dout, q, k, inputs.v)),
        inputs.vectors,
        options.sizes(q, k, inputs.v),
        options.span,
        seen_by,
        options.scoring,
        *options.seeds,
        bias_view_of(dbias),
        (heads, q.shape[0] // batch, q.shape[2] // heads),
        **inputs.dims,
        WIDE=inputs.wide,
        **configs.launch(config, q.device),
    )


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def bias_gradient_kernel(
    dout,
    q,
    k,
    v,
    vectors,
    sizes,
    span,
    seen_by,
    scoring,
    seed_low,
    seed_high,
    dbias,
    repeats,
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
    heads, batch_repeats, head_repeats = repeats
    pid = tl.program_id(0)
    key_tiles = tl.cdiv(sizes.k_len, BLOCK_K)
    n = pid % key_tiles * BLOCK_K
    pid = pid // key_tiles
    j = n + tl.arange(0, BLOCK_K)
    j_in = j < sizes.k_len
    begin = 0
    end = sizes.q_len
    if seen_by is not None:
        begin = tl.load(seen_by.first + n)
        end = tl.load(seen_by.stop + tl.minimum(n + BLOCK_K, sizes.k_len) - 1)
    if dbias.row is not None:
        row_tiles = tl.cdiv(sizes.q_len, BLOCK_Q)
        tile = pid % row_tiles * BLOCK_Q
        pid = pid // row_tiles
        begin = tl.maximum(begin, tile)
        end = tl.minimum(end, tile + BLOCK_Q)
        if begin < end:
            begin = tile
    else:
        begin = begin // BLOCK_Q * BLOCK_Q
    own_b = pid // heads
    own_h = pid % heads
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for m in range(begin, end, BLOCK_Q):
        for repeat in range(batch_repeats * head_repeats):
            # a dim is either its own or all repeats
            b = own_b + repeat // head_repeats
            h = own_h + repeat % head_repeats
            total += _gradient_of_tile(
                m, n, b, h, j, j_in, dout, q, k, v, vectors, sizes, span, scoring,
                (seed_low, seed_high),
                D, BLOCK_D, DV, BLOCK_DV, BLOCK_Q, BLOCK_K, WIDE,
            )  # fmt: skip
    ptr = dbias.ptr + tl.cast(own_b, tl.int64) * dbias.batch
    ptr += tl.cast(own_h, tl.int64) * dbias.head + j.to(tl.int64) * dbias.key
    if begin < end:
        if dbias.row is None:
            tl.store(ptr, tl.load(ptr, mask=j_in) + tl.sum(total, 0), mask=j_in)
        else:
            i = begin + tl.arange(0, BLOCK_Q)
            at = ptr[None, :] + i.to(tl.int64)[:, None] * dbias.row
            inside = (i < sizes.q_len)[:, None] & j_in[None, :]
            tl.store(at, tl.load(at, mask=inside) + total, mask=inside)


@triton.jit
def _gradient_of_tile(
    m,
    n,
    b,
    h,
    j,
    j_in,
    dout,
    q,
    k,
    v,
    vectors,
    sizes,
    span,
    scoring,
    random,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradient of the scores of one tile of one head."""
    q_len = sizes.q_len
    g = (h + sizes.shift) // sizes.group
    i = m + tl.arange(0, BLOCK_Q)
    i_in = i < q_len
    q_tile = load_tile(base(q, b, h), q.row, m, q_len, BLOCK_Q, D, BLOCK_D, True, WIDE)
    k_tile = load_tile(base(k, b, g), k.row, n, sizes.k_len, BLOCK_K, D, BLOCK_D, True, WIDE)
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    lse, delta = of_rows(vectors, b, h, i, i_in, True)
    at = (i[:, None], j[None, :], i_in[:, None], j_in[None, :], b, h)
    p, _ = weights(s, lse[:, None], at, scoring)
    if span is None:
        visible = i_in[:, None] & j_in[None, :]
    else:
        first = tl.load(span.first + i, mask=i_in, other=0)
        stop = tl.load(span.stop + i, mask=i_in, other=0)
        visible = (j[None, :] >= first[:, None]) & (j[None, :] < stop[:, None])
    p = tl.where(visible, p, 0.0)
    dout_tile = load_tile(base(dout, b, h), dout.row, m, q_len, BLOCK_Q, DV, BLOCK_DV, True, WIDE)
    v_tile = load_tile(base(v, b, g), v.row, n, sizes.k_len, BLOCK_K, DV, BLOCK_DV, True, WIDE)
    dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
    _, ds = gradient_of_scores(p, dp, delta[:, None], at, scoring, random)
    return ds
