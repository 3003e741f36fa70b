"""dq on Hopper: a program owns a tile of rows and goes through the keys that they see.

Each consumer owns half of the rows. What a tile of keys adds to dq is issued behind the scores of
the next one, and is under way while their weights are taken.

B batch, Lq / Lk rows of queries / keys, H query heads, G key heads, D head dim, Dv that of v.

Source: FlashAttention-3, arXiv:2407.08608.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from usp.kernels.hopper.pipeline import (
    ends_of,
    fill,
    fragment,
    is_edge,
    matrix,
    new_barriers,
    new_tiles,
    once_more,
    tile_at,
    visible,
    visits,
    walk_of,
)
from usp.kernels.scores import of_rows
from usp.kernels.tiles import program


@gluon.jit
def queries_kernel(
    dout,
    q,
    k,
    v,
    vectors,
    sizes,
    span,
    scale,
    dq,
    scales,
    D: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dout, q, k, v are descriptors of tiles; dout's and q's have the rows of one consumer."""
    b, h, start = _place(sizes, sizes.q_len, BLOCK_Q)
    walk = walk_of(span, start, sizes.q_len, sizes.k_len, BLOCK_Q, BLOCK_K)
    tiles = (new_tiles(q, 2), new_tiles(dout, 2), new_tiles(k, STAGES), new_tiles(v, STAGES))
    barriers = (
        new_barriers(2, 1),
        new_barriers(STAGES, 1),
        new_barriers(STAGES, 2),
        new_barriers(STAGES, 1),
        new_barriers(STAGES, 2),
    )
    where = (b, h, start, walk)
    given = (vectors, sizes, span, scale, dq, scales)
    g = (h + sizes.shift) // sizes.group
    gl.warp_specialize(
        [
            (_consume, (tiles, barriers, where, given, 0, D)),
            (_consume, (tiles, barriers, where, given, 1, D)),
            (_produce, (tiles, barriers, where, (dout, q, k, v), g)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _place(sizes, q_len, BLOCK_Q: gl.constexpr):
    """Which rows are this program's."""
    tile, sequence = program(gl.cdiv(q_len, BLOCK_Q), sizes.together, 1)
    return sequence // sizes.num_heads, sequence % sizes.num_heads, tile * BLOCK_Q


@gluon.jit
def _produce(tiles, barriers, where, descriptors, g):
    """Load the rows of both consumers, then keys and values as their stages become empty."""
    q_tiles, dout_tiles, k_tiles, v_tiles = tiles
    held, k_full, k_empty, v_full, v_empty = barriers
    dout, q, k, v = descriptors
    b, h, start, walk = where
    STAGES: gl.constexpr = k_tiles.shape[0]
    if visits(walk) > 0:
        for c in gl.static_range(2):
            i = start + c * q_tiles.shape[3]
            mbarrier.expect(held.index(c), q.block_type.nbytes + dout.block_type.nbytes)
            fill(q, b, h, i, q_tiles, held, c)
            fill(dout, b, h, i, dout_tiles, held, c)
    for u in range(visits(walk)):
        stage = u % STAGES
        free = u // STAGES & 1 ^ 1
        j = tile_at(u, walk, k_tiles.shape[3])
        # values first: keys of a tile are needed once more when the next one's values are done
        mbarrier.wait(v_empty.index(stage), free)
        mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
        fill(v, b, g, j, v_tiles, v_full, stage)
        mbarrier.wait(k_empty.index(stage), free)
        mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
        fill(k, b, g, j, k_tiles, k_full, stage)


@gluon.jit
def _consume(tiles, barriers, where, given, C: gl.constexpr, D: gl.constexpr):
    """Half of the program's rows: the C-th."""
    q_tiles, _, k_tiles, _ = tiles
    b, h, start, walk = where
    vectors, sizes, span, scale, dq, scales = given
    ROWS: gl.constexpr = q_tiles.shape[3]
    BLOCK_D: gl.constexpr = q_tiles.shape[4]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, k_tiles.shape[3], 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    start = start + C * ROWS
    if visits(walk) > 0:
        at, inside = fragment(dq, b, h, start, sizes.q_len, ROWS, D, BLOCK_D, A)
        dq_sum = gl.load(at, mask=inside, other=0.0) * scales[1]
        i = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        lse, delta = of_rows(vectors, b, h, i, i < sizes.q_len, True)
        ends = ends_of(span, i, sizes.q_len)
        seen = (span, ends, sizes.k_len, scale, lse, delta)
        dq_sum = _visit(dq_sum, tiles, barriers, walk, seen, C, S, A)
        b, h, start = _place(sizes, once_more(sizes.q_len), 2 * ROWS)
        start += C * ROWS
        at, inside = fragment(dq, b, h, start, sizes.q_len, ROWS, D, BLOCK_D, A)
        gl.store(at, dq_sum * scales[0], mask=inside)


@gluon.jit
def _visit(
    dq_sum, tiles, barriers, walk, seen, C: gl.constexpr, S: gl.constexpr, A: gl.constexpr
):  # fmt: skip
    """Add what the keys of the walk give to a consumer's rows."""
    q_tiles, dout_tiles, k_tiles, v_tiles = tiles
    held, k_full, k_empty, v_full, v_empty = barriers
    delta = seen[5]
    STAGES: gl.constexpr = k_tiles.shape[0]
    ROWS: gl.constexpr = q_tiles.shape[3]
    BLOCK_K: gl.constexpr = k_tiles.shape[3]
    zero = gl.zeros([ROWS, BLOCK_K], gl.float32, S)
    q = matrix(q_tiles, C)
    dout = matrix(dout_tiles, C)
    mbarrier.wait(held.index(C), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, matrix(k_tiles, 0).permute([1, 0]), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(0), 0)
    dp = warpgroup_mma(
        dout, matrix(v_tiles, 0).permute([1, 0]), zero, use_acc=False, is_async=True
    )  # fmt: skip
    s = warpgroup_mma_wait(1, deps=[s])
    p = _weights(s, 0, walk, seen, BLOCK_K, S)
    dp = warpgroup_mma_wait(0, deps=[dp])
    mbarrier.arrive(v_empty.index(0), count=1)
    ds = (p * (dp - delta[:, None])).to(k_tiles.dtype)
    ds = gl.convert_layout(ds, gl.DotOperandLayout(0, A, 2))
    last = visits(walk) - 1
    for u in range(1, last + 1):
        stage = u % STAGES
        before = (u - 1) % STAGES
        keys = matrix(k_tiles, stage).permute([1, 0])
        values = matrix(v_tiles, stage).permute([1, 0])
        mbarrier.wait(k_full.index(stage), u // STAGES & 1)
        s = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(stage), u // STAGES & 1)
        dp = warpgroup_mma(dout, values, zero, use_acc=False, is_async=True)
        dq_sum = warpgroup_mma(ds, matrix(k_tiles, before), dq_sum, is_async=True)
        s = warpgroup_mma_wait(2, deps=[s])
        p = _weights(s, u, walk, seen, BLOCK_K, S)
        dp = warpgroup_mma_wait(1, deps=[dp])
        mbarrier.arrive(v_empty.index(stage), count=1)
        next_ds = (p * (dp - delta[:, None])).to(k_tiles.dtype)
        dq_sum = warpgroup_mma_wait(0, deps=[dq_sum])
        mbarrier.arrive(k_empty.index(before), count=1)
        ds = gl.convert_layout(next_ds, gl.DotOperandLayout(0, A, 2))
    dq_sum = warpgroup_mma(ds, matrix(k_tiles, last % STAGES), dq_sum, is_async=True)
    return warpgroup_mma_wait(0, deps=[dq_sum])


@gluon.jit
def _weights(s, u, walk, seen, BLOCK_K: gl.constexpr, S: gl.constexpr):
    """Weights of the u-th tile of scores, by the final lse."""
    span, ends, k_len, scale, lse, _ = seen
    p = gl.exp2(s * scale - lse[:, None])
    if is_edge(u, walk):
        j = tile_at(u, walk, BLOCK_K) + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, S))
        p = gl.where(visible(span, ends, j, k_len), p, 0.0)
    return p
