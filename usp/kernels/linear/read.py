"""What tokens see of a state and of their own chunk; out and each gradient are such.

``weight_i x_i S + sum over j of decay_ij <x_i, y_j> z_j``, over tokens up to i forward, from i on
back, of heads that share a head of the result added up:

| result | x | y | z | S | order |
|---|---|---|---|---|---|
| out | q | k | v | state before the chunk | forward |
| dq | dout | v | k | the same, transposed | forward |
| dk | v | dout | q | gradient of the state behind the chunk, transposed | back |
| dv | k | q | dout | the same | back |

With a decay a channel it is out and dv: what pairs see of each other was worked out before
(``channels``), and each channel of x has its weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from usp.kernels.linear.tiles import (
    carried,
    carried_tile,
    inside_state,
    product,
    seen,
    state_pointers,
    tokens_tile,
)
from usp.kernels.tiles import base, program, tile_pointers


@triton.jit
def read_kernel(
    x,
    y,
    z,
    g,
    pairs,
    states,
    out,
    sizes,
    X: tl.constexpr,
    BLOCK_X: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    BACK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    NUM_XCDS: tl.constexpr,
):
    """
    Args:
        x, y: (B, L, ., X). z: (B, L, ., E). out: (B, L, ., E).
        pairs: (B, H, n, CHUNK, CHUNK), scores with a decay a channel; None with another or none.
        states: (B, H, n, D, Dv), strides of channels in ``sizes``.
    """
    tile, sequence = program(sizes.chunks * tl.cdiv(E, BLOCK_E), None, NUM_XCDS, KEYS=True)
    chunk = tile // tl.cdiv(E, BLOCK_E)
    first_e = tile % tl.cdiv(E, BLOCK_E) * BLOCK_E
    num_results = sizes.heads // sizes.out_group
    b = sequence // num_results
    result = sequence % num_results
    start = chunk * CHUNK
    total = tl.zeros([CHUNK, BLOCK_E], tl.float32)
    for n in range(sizes.out_group):
        h = result * sizes.out_group + n
        place = (tl.cast(b, tl.int64) * sizes.heads + h) * sizes.chunks + chunk
        state_ptr = states + place * (X * E)
        x_ptr = base(x, b, h // sizes.x_group)
        y_ptr = base(y, b, h // sizes.y_group)
        scores = tl.zeros([CHUNK, CHUNK], tl.float32)
        of_state = tl.zeros([CHUNK, BLOCK_E], tl.float32)
        for first_x in range(0, X, BLOCK_X):
            x_tile = tokens_tile(
                x_ptr, x.row, start, sizes.length, first_x, CHUNK, X, BLOCK_X, WIDE
            )
            if pairs is None:
                y_tile = tokens_tile(
                    y_ptr, y.row, start, sizes.length, first_x, CHUNK, X, BLOCK_X, WIDE
                )
                scores = tl.dot(x_tile, tl.trans(y_tile), scores, input_precision="ieee")
            else:
                x_tile = x_tile.to(tl.float32) * carried_tile(
                    g, b, h, start, sizes.length, first_x, CHUNK, X, BLOCK_X, BACK, WIDE
                )
            at = state_pointers(
                state_ptr, first_x, sizes.x_stride, first_e, sizes.e_stride, BLOCK_X, BLOCK_E
            )
            inside = inside_state(first_x, first_e, X, BLOCK_X, E, BLOCK_E)
            state = tl.load(at, mask=inside, other=0.0)
            of_state = product(x_tile, state, of_state, PRECISION)
        if pairs is None:
            scores = seen(scores, g, b, h, start, sizes.length, CHUNK, BACK)
        else:
            i = tl.arange(0, CHUNK)[:, None]
            j = tl.arange(0, CHUNK)[None, :]
            at = pairs + place * (CHUNK * CHUNK) + (j * CHUNK + i if BACK else i * CHUNK + j)
            scores = tl.load(at).to(tl.float32)
        if g is not None and pairs is None:
            of_state *= carried(g, b, h, start, sizes.length, CHUNK, BACK)[:, None]
        z_tile = tokens_tile(
            base(z, b, h // sizes.z_group), z.row, start, sizes.length, first_e,
            CHUNK, E, BLOCK_E, WIDE,
        )  # fmt: skip
        total += product(scores, z_tile, of_state, PRECISION)
    at = tile_pointers(base(out, b, result) + first_e, out.row, start, CHUNK, BLOCK_E, WIDE)
    inside = (start + tl.arange(0, CHUNK) < sizes.length)[:, None]
    inside = inside & (first_e + tl.arange(0, BLOCK_E) < E)[None, :]
    tl.store(at, total.to(out.ptr.dtype.element_ty), mask=inside)
