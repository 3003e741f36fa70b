"""dk and dv on Hopper: a program owns a tile of keys and goes through the rows that see them.

Each consumer owns half of the keys. Scores are taken transposed, keys by rows: weights and their
gradients go from registers into the next product, whose other side is the tile of dout or q that
is there already.

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
    matrix,
    new_barriers,
    new_rows,
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
def keys_kernel(
    dout,
    q,
    k,
    v,
    vectors,
    sizes,
    seen_by,
    scale,
    dk,
    dv,
    scales,
    D: gl.constexpr,
    DV: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dout, q, k, v are descriptors of tiles; k's and v's have the rows of one consumer."""
    b, g, start = _place(sizes, sizes.k_len, BLOCK_K)
    walk = walk_of(seen_by, start, sizes.k_len, sizes.q_len, BLOCK_K, BLOCK_Q)
    # the query heads here that read this key head
    h_begin = gl.maximum(g * sizes.group - sizes.shift, 0)
    heads = 1
    if sizes.group != 1:
        heads = gl.minimum((g + 1) * sizes.group - sizes.shift, sizes.num_heads) - h_begin
    tiles = (new_tiles(k, 2), new_tiles(v, 2), new_tiles(q, STAGES), new_tiles(dout, STAGES))
    rows = (
        new_rows(gl.float32, STAGES, BLOCK_Q),
        new_rows(gl.float32, STAGES, BLOCK_Q),
        new_rows(gl.int32, STAGES, BLOCK_Q),
    )
    barriers = (new_barriers(2, 1), new_barriers(STAGES, 1), new_barriers(STAGES, 2))
    where = (b, g, start, walk, heads)
    given = (sizes, seen_by, scale, dk, dv, scales)
    descriptors = (dout, q, k, v)
    gl.warp_specialize(
        [
            (_consume, (tiles, rows, barriers, where, given, 0, D, DV)),
            (_consume, (tiles, rows, barriers, where, given, 1, D, DV)),
            (_produce, (tiles, rows, barriers, where, descriptors, vectors, h_begin, sizes.q_len)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _place(sizes, k_len, BLOCK_K: gl.constexpr):
    """Which keys are this program's."""
    tile, sequence = program(gl.cdiv(k_len, BLOCK_K), sizes.together, 1, KEYS=True)
    return sequence // sizes.num_kv_heads, sequence % sizes.num_kv_heads, tile * BLOCK_K


@gluon.jit
def _produce(tiles, rows, barriers, where, descriptors, vectors, h_begin, q_len):
    """Load keys and values of both consumers, then rows as their stages become empty."""
    k_tiles, v_tiles, q_tiles, dout_tiles = tiles
    lse_rows, delta_rows, i_rows = rows
    held, full, empty = barriers
    dout, q, k, v = descriptors
    b, g, start, walk, heads = where
    STAGES: gl.constexpr = q_tiles.shape[0]
    BLOCK_Q: gl.constexpr = q_tiles.shape[3]
    if visits(walk) > 0:
        for c in gl.static_range(2):
            j = start + c * k_tiles.shape[3]
            mbarrier.expect(held.index(c), k.block_type.nbytes + v.block_type.nbytes)
            fill(k, b, g, j, k_tiles, held, c)
            fill(v, b, g, j, v_tiles, held, c)
    lanes = gl.arange(0, BLOCK_Q, layout=gl.BlockedLayout([BLOCK_Q // 32], [32], [1], [0]))
    for visit in range(visits(walk) * heads):
        stage = visit % STAGES
        h = h_begin + visit % heads
        m = tile_at(visit // heads, walk, BLOCK_Q)
        i = m + lanes
        lse, delta = of_rows(vectors, b, h, i, i < q_len, True)
        mbarrier.wait(empty.index(stage), visit // STAGES & 1 ^ 1)
        lse_rows.index(stage).store(lse)
        delta_rows.index(stage).store(delta)
        # as numbers of registers that a consumer has not
        i_rows.index(stage).store(i)
        mbarrier.expect(full.index(stage), q.block_type.nbytes + dout.block_type.nbytes)
        fill(q, b, h, m, q_tiles, full, stage)
        fill(dout, b, h, m, dout_tiles, full, stage)


@gluon.jit
def _consume(
    tiles, rows, barriers, where, given, C: gl.constexpr, D: gl.constexpr, DV: gl.constexpr
):  # fmt: skip
    """Half of the program's keys: the C-th."""
    k_tiles, v_tiles, _, _ = tiles
    b, g, start, walk, heads = where
    sizes, seen_by, scale, dk, dv, scales = given
    ROWS: gl.constexpr = k_tiles.shape[3]
    BLOCK_D: gl.constexpr = k_tiles.shape[4]
    BLOCK_DV: gl.constexpr = v_tiles.shape[4]
    K: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    V: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    start = start + C * ROWS
    if visits(walk) > 0:
        at, inside = fragment(dk, b, g, start, sizes.k_len, ROWS, D, BLOCK_D, K)
        dk_sum = gl.load(at, mask=inside, other=0.0) * scales[1]
        at, inside = fragment(dv, b, g, start, sizes.k_len, ROWS, DV, BLOCK_DV, V)
        dv_sum = gl.load(at, mask=inside, other=0.0)
        seen = (seen_by, start, sizes.k_len, sizes.q_len, scale)
        dk_sum, dv_sum = _visit(
            dk_sum, dv_sum, tiles, rows, barriers, walk, heads, seen, C, K, V
        )  # fmt: skip
        b, g, start = _place(sizes, once_more(sizes.k_len), 2 * ROWS)
        start += C * ROWS
        at, inside = fragment(dk, b, g, start, sizes.k_len, ROWS, D, BLOCK_D, K)
        gl.store(at, dk_sum * scales[0], mask=inside)
        at, inside = fragment(dv, b, g, start, sizes.k_len, ROWS, DV, BLOCK_DV, V)
        gl.store(at, dv_sum, mask=inside)


@gluon.jit
def _visit(
    dk_sum, dv_sum, tiles, rows, barriers, walk, heads, seen,
    C: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    """Add what the rows of the walk, of all heads of a group, give to a consumer's keys."""
    k_tiles, v_tiles, q_tiles, dout_tiles = tiles
    lse_rows, delta_rows, i_rows = rows
    held, full, empty = barriers
    seen_by, start, k_len, q_len, scale = seen
    STAGES: gl.constexpr = q_tiles.shape[0]
    ROWS: gl.constexpr = k_tiles.shape[3]
    BLOCK_Q: gl.constexpr = q_tiles.shape[3]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    zero = gl.zeros([ROWS, BLOCK_Q], gl.float32, S)
    j = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    ends = ends_of(seen_by, j, k_len)
    k = matrix(k_tiles, C)
    v = matrix(v_tiles, C)
    mbarrier.wait(held.index(C), 0)
    # the visits whose tiles need no mask
    full_begin = walk[1] * heads
    full_end = full_begin + walk[3] * heads
    for visit in range(visits(walk) * heads):
        stage = visit % STAGES
        q = matrix(q_tiles, stage)
        dout = matrix(dout_tiles, stage)
        mbarrier.wait(full.index(stage), visit // STAGES & 1)
        s = warpgroup_mma(k, q.permute([1, 0]), zero, use_acc=False, is_async=True)
        dp = warpgroup_mma(v, dout.permute([1, 0]), zero, use_acc=False, is_async=True)
        lse = lse_rows.index(stage).load(gl.SliceLayout(0, S))
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * scale - lse[None, :])
        if (visit < full_begin) | (visit >= full_end):
            i = i_rows.index(stage).load(gl.SliceLayout(0, S))
            p = gl.where(visible(seen_by, ends, i, q_len), p, 0.0)
        weights = gl.convert_layout(p.to(dout_tiles.dtype), gl.DotOperandLayout(0, V, 2))
        dv_sum = warpgroup_mma(weights, dout, dv_sum, is_async=True)
        delta = delta_rows.index(stage).load(gl.SliceLayout(0, S))
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = p * (dp - delta[None, :])
        ds = gl.convert_layout(ds.to(q_tiles.dtype), gl.DotOperandLayout(0, K, 2))
        dk_sum = warpgroup_mma(ds, q, dk_sum, is_async=True)
        dk_sum, dv_sum = warpgroup_mma_wait(0, deps=[dk_sum, dv_sum])
        mbarrier.arrive(empty.index(stage), count=1)
    return dk_sum, dv_sum
