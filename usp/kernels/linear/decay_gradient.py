"""The gradient of each token's log decay: all that passes from before the token to it or behind it.

Of a chunk that is what its later tokens see of its earlier ones, what tokens from it on see of the
state before, what those before it put into the state behind, and what passes through from the one
state to the other. Nothing is subtracted: where a decay is -inf, each of these is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from usp.kernels.linear.tiles import (
    carried,
    inside_state,
    logs,
    product,
    seen,
    state_pointers,
    tokens_tile,
)
from usp.kernels.tiles import base, program


@triton.jit
def decay_kernel(
    q,
    k,
    v,
    dout,
    g,
    states,
    dstates,
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
        states, dstates: (B, H, n, D, Dv), before each chunk, and the gradient of that behind it.
        dg: (B, H, L) fp32, written.
    """
    chunk, sequence = program(sizes.chunks, None, NUM_XCDS, KEYS=True)
    b = sequence // sizes.heads
    h = sequence % sizes.heads
    start = chunk * CHUNK
    place = (tl.cast(sequence, tl.int64) * sizes.chunks + chunk) * (D * DV)
    q_ptr = base(q, b, h // sizes.q_group)
    k_ptr = base(k, b, h // sizes.k_group)
    v_ptr = base(v, b, h // sizes.v_group)
    dout_ptr = base(dout, b, h)
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for d in range(0, D, BLOCK_D):
        q_tile = tokens_tile(q_ptr, q.row, start, sizes.length, d, CHUNK, D, BLOCK_D, WIDE)
        k_tile = tokens_tile(k_ptr, k.row, start, sizes.length, d, CHUNK, D, BLOCK_D, WIDE)
        scores = tl.dot(q_tile, tl.trans(k_tile), scores, input_precision="ieee")
    dscores = tl.zeros([CHUNK, CHUNK], tl.float32)
    read = tl.zeros([CHUNK], tl.float32)
    written = tl.zeros([CHUNK], tl.float32)
    passed = tl.zeros([BLOCK_DV], tl.float32)
    for e in range(0, DV, BLOCK_DV):
        v_tile = tokens_tile(v_ptr, v.row, start, sizes.length, e, CHUNK, DV, BLOCK_DV, WIDE)
        dout_tile = tokens_tile(
            dout_ptr, dout.row, start, sizes.length, e, CHUNK, DV, BLOCK_DV, WIDE
        )
        dscores = tl.dot(dout_tile, tl.trans(v_tile), dscores, input_precision="ieee")
        of_state = tl.zeros([CHUNK, BLOCK_DV], tl.float32)
        of_dstate = tl.zeros([CHUNK, BLOCK_DV], tl.float32)
        for d in range(0, D, BLOCK_D):
            q_tile = tokens_tile(q_ptr, q.row, start, sizes.length, d, CHUNK, D, BLOCK_D, WIDE)
            k_tile = tokens_tile(k_ptr, k.row, start, sizes.length, d, CHUNK, D, BLOCK_D, WIDE)
            inside = inside_state(d, e, D, BLOCK_D, DV, BLOCK_DV)
            at = state_pointers(states + place, d, DV, e, 1, BLOCK_D, BLOCK_DV)
            state = tl.load(at, mask=inside, other=0.0)
            at = state_pointers(dstates + place, d, DV, e, 1, BLOCK_D, BLOCK_DV)
            dstate = tl.load(at, mask=inside, other=0.0)
            of_state = product(q_tile, state, of_state, PRECISION)
            of_dstate = product(k_tile, dstate, of_dstate, PRECISION)
            passed += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 0)
        read += tl.sum(of_state * dout_tile.to(tl.float32), 1)
        written += tl.sum(of_dstate * v_tile.to(tl.float32), 1)
    read *= carried(g, b, h, start, sizes.length, CHUNK, False)
    written *= carried(g, b, h, start, sizes.length, CHUNK, True)
    through = tl.sum(passed, 0) * tl.exp2(tl.sum(logs(g, b, h, start, sizes.length, CHUNK, 0), 0))
    # [i, j]: what i sees of j passes the tokens behind j up to i
    pairs = seen(scores, g, b, h, start, sizes.length, CHUNK, False) * dscores
    row = tl.arange(0, CHUNK)[:, None]
    column = tl.arange(0, CHUNK)[None, :]
    later = tl.cumsum(pairs, 0, reverse=True) + written[None, :]
    found = tl.sum(tl.where(column < row, later, read[None, :]), 1) + through
    i = start + tl.arange(0, CHUNK)
    at = dg + tl.cast(sequence, tl.int64) * sizes.length + i
    tl.store(at, found, mask=i < sizes.length)
