"""dq, dk and the gradient of the logs, where each key channel has a decay of its own.

A program has some channels of a chunk: what comes of the states there, of the seam between the
chunk's halves, and of pairs inside a half (``channels``). The gradient of a log is all that passes
from before its token to it or behind it, as in ``decay_gradient``, of each channel by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from usp.kernels.linear.tiles import (
    LOG2E,
    carried_tile,
    inside_state,
    logs_tile,
    product,
    state_pointers,
    tokens_row,
    tokens_tile,
)
from usp.kernels.tiles import base, program, tile_pointers


@triton.jit
def behind(x):
    """Of each row the sum of those from it on."""
    return tl.cumsum(x, 0, reverse=True)


@triton.jit
def of_pairs(
    dscores,
    q_tile,
    k,
    g,
    dq,
    dk,
    dg,
    written,
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
    """dq, dk and dg (HALF, BLOCK_D) of a half, and what its pairs add.

    Args:
        dscores: (HALF, HALF), without decays.
        written: What passes from each token to behind the half, and so the decays of those between.
    """
    row = tl.arange(0, HALF)[:, None]
    column = tl.arange(0, HALF)[None, :]
    between = tl.zeros([HALF, BLOCK_D], tl.float32)  # logs behind j, up to each token
    for n in range(HALF):
        j = HALF - 1 - n
        key = tokens_row(k, b, k_head, first + j, length, d, D, BLOCK_D)[None, :]
        log = tokens_row(g, b, h, first + j, length, d, D, BLOCK_D)
        of_j = tl.sum(tl.where((column == j) & (row >= j), dscores, 0.0), 1)
        weight = of_j[:, None] * tl.exp2(between)
        dq += weight * key
        of_key = weight * q_tile
        dk += tl.where(row == j, tl.sum(of_key, 0)[None, :], 0.0)
        passed = behind(tl.where(row > j, of_key * key, 0.0))
        passed += tl.sum(tl.where(row == j, written, 0.0), 0)[None, :]
        dg += tl.where(row > j, passed, 0.0)
        between += tl.where(row >= j, log[None, :] * LOG2E, 0.0)
    return dq, dk, dg


@triton.jit
def put(
    view,
    b,
    h,
    first,
    length,
    d,
    tile,
    HALF: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write channels from d on of a half's tokens."""
    at = tile_pointers(base(view, b, h) + d, view.row, first, HALF, BLOCK_D, WIDE)
    inside = (first + tl.arange(0, HALF) < length)[:, None]
    inside = inside & (d + tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(at, tile.to(view.ptr.dtype.element_ty), mask=inside)


@triton.jit
def channel_gradients_kernel(
    q,
    k,
    v,
    dout,
    g,
    states,
    dstates,
    dq,
    dk,
    dg,
    sizes,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    NUM_XCDS: tl.constexpr,
):
    """
    Args:
        q, k: (B, L, ., D). v: (B, L, ., Dv). dout: (B, L, H, Dv). g: (B | 1, L, H | 1, D).
        states, dstates: (B, H, n, D, Dv), before each chunk, and the gradient of that behind it.
        dq, dk, dg: (B, L, H, D), written.
    """
    HALF: tl.constexpr = CHUNK // 2
    tile, sequence = program(sizes.chunks * tl.cdiv(D, BLOCK_D), None, NUM_XCDS, KEYS=True)
    chunk = tile // tl.cdiv(D, BLOCK_D)
    d = tile % tl.cdiv(D, BLOCK_D) * BLOCK_D
    b = sequence // sizes.heads
    h = sequence % sizes.heads
    start = chunk * CHUNK
    seam = start + HALF
    length = sizes.length
    k_head = h // sizes.k_group
    place = (tl.cast(sequence, tl.int64) * sizes.chunks + chunk) * (D * DV)
    v_ptr = base(v, b, h // sizes.v_group)
    dout_ptr = base(dout, b, h)
    of_earlier = tl.zeros([HALF, HALF], tl.float32)  # gradients of scores
    of_later = tl.zeros([HALF, HALF], tl.float32)
    across = tl.zeros([HALF, HALF], tl.float32)
    dq_earlier = tl.zeros([HALF, BLOCK_D], tl.float32)
    dq_later = tl.zeros([HALF, BLOCK_D], tl.float32)
    dk_earlier = tl.zeros([HALF, BLOCK_D], tl.float32)
    dk_later = tl.zeros([HALF, BLOCK_D], tl.float32)
    through = tl.zeros([BLOCK_D], tl.float32)
    for e in range(0, DV, BLOCK_DV):
        v_earlier = tokens_tile(v_ptr, v.row, start, length, e, HALF, DV, BLOCK_DV, WIDE)
        v_later = tokens_tile(v_ptr, v.row, seam, length, e, HALF, DV, BLOCK_DV, WIDE)
        d_earlier = tokens_tile(dout_ptr, dout.row, start, length, e, HALF, DV, BLOCK_DV, WIDE)
        d_later = tokens_tile(dout_ptr, dout.row, seam, length, e, HALF, DV, BLOCK_DV, WIDE)
        of_earlier = tl.dot(d_earlier, tl.trans(v_earlier), of_earlier, input_precision="ieee")
        of_later = tl.dot(d_later, tl.trans(v_later), of_later, input_precision="ieee")
        across = tl.dot(d_later, tl.trans(v_earlier), across, input_precision="ieee")
        inside = inside_state(d, e, D, BLOCK_D, DV, BLOCK_DV)
        at = state_pointers(states + place, d, DV, e, 1, BLOCK_D, BLOCK_DV)
        state = tl.load(at, mask=inside, other=0.0)
        at = state_pointers(dstates + place, d, DV, e, 1, BLOCK_D, BLOCK_DV)
        dstate = tl.load(at, mask=inside, other=0.0)
        dq_earlier = product(d_earlier, tl.trans(state), dq_earlier, PRECISION)
        dq_later = product(d_later, tl.trans(state), dq_later, PRECISION)
        dk_earlier = product(v_earlier, tl.trans(dstate), dk_earlier, PRECISION)
        dk_later = product(v_later, tl.trans(dstate), dk_later, PRECISION)
        through += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)

    q_ptr = base(q, b, h // sizes.q_group)
    k_ptr = base(k, b, k_head)
    q_earlier = tokens_tile(q_ptr, q.row, start, length, d, HALF, D, BLOCK_D, WIDE).to(tl.float32)
    q_later = tokens_tile(q_ptr, q.row, seam, length, d, HALF, D, BLOCK_D, WIDE).to(tl.float32)
    k_earlier = tokens_tile(k_ptr, k.row, start, length, d, HALF, D, BLOCK_D, WIDE).to(tl.float32)
    k_later = tokens_tile(k_ptr, k.row, seam, length, d, HALF, D, BLOCK_D, WIDE).to(tl.float32)
    first_half = tl.exp2(tl.sum(logs_tile(g, b, h, start, length, d, HALF, D, BLOCK_D, 0, WIDE), 0))
    second_half = tl.exp2(tl.sum(logs_tile(g, b, h, seam, length, d, HALF, D, BLOCK_D, 0, WIDE), 0))

    # of the states
    since = carried_tile(g, b, h, seam, length, d, HALF, D, BLOCK_D, False, WIDE)
    up_to = carried_tile(g, b, h, start, length, d, HALF, D, BLOCK_D, True, WIDE)
    dq_earlier *= carried_tile(g, b, h, start, length, d, HALF, D, BLOCK_D, False, WIDE)
    dq_later *= since * first_half[None, :]
    dk_earlier *= up_to * second_half[None, :]
    dk_later *= carried_tile(g, b, h, seam, length, d, HALF, D, BLOCK_D, True, WIDE)
    through *= first_half * second_half
    dg_earlier = behind(q_earlier * dq_earlier)
    dg_earlier += (through + tl.sum(q_later * dq_later, 0))[None, :]
    dg_later = behind(q_later * dq_later)
    dg_later += (through + tl.sum(k_earlier * dk_earlier, 0))[None, :]

    # of the seam
    none = tl.zeros([HALF, BLOCK_D], tl.float32)
    more = since * product(across, k_earlier * up_to, none, PRECISION)
    dq_later += more
    dg_later += behind(q_later * more)
    more = up_to * product(tl.trans(across), q_later * since, none, PRECISION)
    dk_earlier += more

    # of pairs
    dq_earlier, dk_earlier, dg_earlier = of_pairs(
        of_earlier, q_earlier, k, g, dq_earlier, dk_earlier, dg_earlier, k_earlier * dk_earlier,
        b, h, k_head, start, length, d, HALF, D, BLOCK_D,
    )  # fmt: skip
    dq_later, dk_later, dg_later = of_pairs(
        of_later, q_later, k, g, dq_later, dk_later, dg_later, k_later * dk_later,
        b, h, k_head, seam, length, d, HALF, D, BLOCK_D,
    )  # fmt: skip
    put(dq, b, h, start, length, d, dq_earlier, HALF, D, BLOCK_D, WIDE)
    put(dq, b, h, seam, length, d, dq_later, HALF, D, BLOCK_D, WIDE)
    put(dk, b, h, start, length, d, dk_earlier, HALF, D, BLOCK_D, WIDE)
    put(dk, b, h, seam, length, d, dk_later, HALF, D, BLOCK_D, WIDE)
    put(dg, b, h, start, length, d, dg_earlier, HALF, D, BLOCK_D, WIDE)
    put(dg, b, h, seam, length, d, dg_later, HALF, D, BLOCK_D, WIDE)
