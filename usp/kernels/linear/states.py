"""The state before each chunk, by one pass over them; and back, the gradient of that behind each.

``S -> decay S + sum over tokens of (weight x)^T y``: forward x, y are k, v, and a token's weight is
what decays behind it; back q, dout, and what decays up to it.

Shape letters: B batch, H heads, n chunks; X and E are D and Dv.
"""

from __future__ import annotations

import triton
import triton.language as tl

from usp.kernels.linear.tiles import (
    carried,
    carried_tile,
    inside_state,
    logs,
    logs_tile,
    product,
    state_pointers,
    tokens_tile,
)
from usp.kernels.tiles import base, program


@triton.jit
def states_kernel(
    x,
    y,
    g,
    start_state,
    states,
    last,
    sizes,
    X: tl.constexpr,
    BLOCK_X: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    BACK: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    NUM_XCDS: tl.constexpr,
):
    """
    Args:
        g: (B | 1, L, H | 1), with CHANNELS (B | 1, L, H | 1, X); None for no decay.
        start_state: (B, H, X, E) fp32; None is 0.
        states: (B, H, n, X, E), that before each chunk, or with BACK behind it; None for nowhere.
        last: (B, H, X, E) fp32, the state behind all chunks, or with BACK before them.
    """
    tile, sequence = program(tl.cdiv(X, BLOCK_X) * tl.cdiv(E, BLOCK_E), None, NUM_XCDS, KEYS=True)
    first_x = tile // tl.cdiv(E, BLOCK_E) * BLOCK_X
    first_e = tile % tl.cdiv(E, BLOCK_E) * BLOCK_E
    b = sequence // sizes.heads
    h = sequence % sizes.heads
    whole = tl.cast(sequence, tl.int64) * (X * E)
    inside = inside_state(first_x, first_e, X, BLOCK_X, E, BLOCK_E)
    if start_state is None:
        state = tl.zeros([BLOCK_X, BLOCK_E], tl.float32)
    else:
        held = state_pointers(start_state + whole, first_x, E, first_e, 1, BLOCK_X, BLOCK_E)
        state = tl.load(held, mask=inside, other=0.0)
    x_ptr = base(x, b, h // sizes.x_group)
    y_ptr = base(y, b, h // sizes.y_group)
    for n in range(sizes.chunks):
        chunk = sizes.chunks - 1 - n if BACK else n
        if states is not None:
            place = states + (whole * sizes.chunks + tl.cast(chunk, tl.int64) * (X * E))
            to = state_pointers(place, first_x, E, first_e, 1, BLOCK_X, BLOCK_E)
            tl.store(to, state.to(states.dtype.element_ty), mask=inside)
        start = chunk * CHUNK
        x_tile = tokens_tile(x_ptr, x.row, start, sizes.length, first_x, CHUNK, X, BLOCK_X, WIDE)
        y_tile = tokens_tile(y_ptr, y.row, start, sizes.length, first_e, CHUNK, E, BLOCK_E, WIDE)
        if CHANNELS:
            x_tile = x_tile.to(tl.float32) * carried_tile(
                g, b, h, start, sizes.length, first_x, CHUNK, X, BLOCK_X, not BACK, WIDE
            )
            all_logs = logs_tile(g, b, h, start, sizes.length, first_x, CHUNK, X, BLOCK_X, 0, WIDE)
            state *= tl.exp2(tl.sum(all_logs, 0))[:, None]
        elif g is not None:
            weights = carried(g, b, h, start, sizes.length, CHUNK, not BACK)
            x_tile = x_tile.to(tl.float32) * weights[:, None]
            state *= tl.exp2(tl.sum(logs(g, b, h, start, sizes.length, CHUNK, 0), 0))
        state = product(tl.trans(x_tile), y_tile, state, PRECISION)
    at = state_pointers(last + whole, first_x, E, first_e, 1, BLOCK_X, BLOCK_E)
    tl.store(at, state, mask=inside)
