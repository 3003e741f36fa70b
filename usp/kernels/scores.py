"""From <q, k> to scores in units of log 2, and which weights dropout keeps.

``i`` are query rows, ``j`` key rows, shaped so that they broadcast to the tile: the same functions
serve tiles of queries by keys and of keys by queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """Right to a few fp32 roundings, also near 0 where 1 - 2 / (exp(2x) + 1) cancels."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315))))
    far = 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1)
    return tl.where(square < 0.04, series, far)


@triton.jit
def added_to_scores(s, at, scoring):
    """Scores with bias and ALiBi; ``at`` says which: rows, keys, which of them exist, b, h."""
    i, j, i_in, j_in, b, h = at
    if scoring.bias is not None:
        bias = scoring.bias
        ptr = bias.ptr + tl.cast(b, tl.int64) * bias.batch + tl.cast(h, tl.int64) * bias.head
        if bias.row is None:
            extra = tl.load(ptr + j.to(tl.int64) * bias.key, mask=j_in, other=0.0)
        else:
            place = i.to(tl.int64) * bias.row + j.to(tl.int64) * bias.key
            extra = tl.load(ptr + place, mask=i_in & j_in, other=0.0)
        s += extra * LOG2E
    if scoring.alibi is not None:
        slope = tl.load(scoring.alibi.ptr + b * scoring.alibi.batch + h * scoring.alibi.head)
        q_pos = tl.load(scoring.q_pos + i, mask=i_in, other=0)
        k_pos = tl.load(scoring.k_pos + j, mask=j_in, other=0)
        s -= (slope * LOG2E) * tl.abs(q_pos - k_pos).to(tl.float32)
    return s


@triton.jit
def weights(s, lse, at, scoring):
    """exp(score - lse) of products <q, k>, and the slope of softcap there, 1 without."""
    s = s * scoring.scale
    slope = 1.0
    if scoring.softcap is not None:
        capped = tanh(s)
        slope = 1 - capped * capped
        s = capped * scoring.softcap
    return tl.exp2(added_to_scores(s, at, scoring) - lse), slope


@triton.jit
def gradient_of_scores(p, dp, delta, at, scoring, random):
    """Weights after dropout, and the gradient of the scores after bias and cap."""
    if scoring.dropout is None:
        dropped = p
    else:
        factor = kept(at, scoring, random)
        dropped = p * factor
        dp = dp * factor
    return dropped, p * (dp - delta)


@triton.jit
def kept(at, scoring, random):
    """Factor of each weight: 0, or 1 / (1 - dropout_p). Philox-4x32-10 of the positions."""
    i, j, i_in, j_in, b, h = at
    seed_low, seed_high = random
    dropout = scoring.dropout
    q_pos = tl.load(scoring.q_pos + i, mask=i_in, other=0)
    k_pos = tl.load(scoring.k_pos + j, mask=j_in, other=0)
    zero = (q_pos + k_pos) * 0
    stream = b * dropout.num_heads + dropout.head_offset + h
    w0, w1, w2, w3 = tl.philox_impl(
        ((k_pos >> 2) + zero).to(tl.uint32, bitcast=True),
        (q_pos + zero).to(tl.uint32, bitcast=True),
        (stream + zero).to(tl.uint32, bitcast=True),
        zero.to(tl.uint32, bitcast=True),
        seed_low.to(tl.uint32, bitcast=True),
        seed_high.to(tl.uint32, bitcast=True),
        10,
    )
    lane = k_pos & 3
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    threshold = tl.full([], dropout.threshold, tl.int32).to(tl.uint32, bitcast=True)
    return tl.where(word >= threshold, dropout.factor, 0.0)


@triton.jit
def of_rows(vectors, b, h, i, i_in, MASKED: tl.constexpr):
    """lse in units of log 2 and delta of some rows; +inf, so weight 0, where nothing was seen."""
    lse, delta, lse_batch, lse_head, delta_batch, delta_head = vectors
    lse_at = lse + tl.cast(b, tl.int64) * lse_batch + tl.cast(h, tl.int64) * lse_head + i
    delta_at = delta + tl.cast(b, tl.int64) * delta_batch + tl.cast(h, tl.int64) * delta_head + i
    if MASKED:
        top = tl.load(lse_at, mask=i_in, other=float("-inf"))
        sums = tl.load(delta_at, mask=i_in, other=0.0)
    else:
        top = tl.load(lse_at)
        sums = tl.load(delta_at)
    return tl.where(top == float("-inf"), float("inf"), top * LOG2E), sums
