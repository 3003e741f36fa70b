"""Keys into the running softmax on Hopper: the contract of the portable kernel.

While a consumer takes the softmax of one tile of scores, its tensor core works on the product of
the next one, issued before it, and on weights times values of the one before. The two consumers
take turns in issuing products, so that the softmax of one lies under the products of the other.

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
from usp.kernels.tiles import program

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    lse_batch,
    lse_head,
    result,
    sizes,
    span,
    scale,
    DV: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """q, k, v are descriptors of (1, 1, rows, D) tiles; q's has the rows of one consumer."""
    tile, sequence = program(gl.cdiv(sizes.q_len, BLOCK_Q), sizes.together, 1)
    b = sequence // sizes.num_heads
    h = sequence % sizes.num_heads
    start = tile * BLOCK_Q
    walk = walk_of(span, start, sizes.q_len, sizes.k_len, BLOCK_Q, BLOCK_K)
    tiles = (new_tiles(q, 2), new_tiles(k, STAGES), new_tiles(v, STAGES))
    barriers = (
        new_barriers(2, 1),
        new_barriers(STAGES, 1),
        new_barriers(STAGES, 2),
        new_barriers(STAGES, 1),
        new_barriers(STAGES, 2),
        new_barriers(2, 1),
    )
    where = (b, h, start, walk)
    state = (out, lse, lse_batch, lse_head, result)
    g = (h + sizes.shift) // sizes.group
    gl.warp_specialize(
        [
            (_consume, (tiles, barriers, where, state, sizes, span, scale, 0, DV)),
            (_consume, (tiles, barriers, where, state, sizes, span, scale, 1, DV)),
            (_produce, (tiles, barriers, where, (q, k, v), g)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _produce(tiles, barriers, where, descriptors, g):
    """Load the queries of both consumers, then keys and values as their stages become empty."""
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, k_empty, v_full, v_empty, _ = barriers
    q, k, v = descriptors
    b, h, start, walk = where
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_K: gl.constexpr = k_tiles.shape[3]
    if visits(walk) > 0:
        for c in gl.static_range(2):
            mbarrier.expect(q_full.index(c), q.block_type.nbytes)
            fill(q, b, h, start + c * q_tiles.shape[3], q_tiles, q_full, c)
    # keys run one tile ahead, as their products do
    for u in range(visits(walk) + 1):
        if u < visits(walk):
            stage = u % STAGES
            mbarrier.wait(k_empty.index(stage), u // STAGES & 1 ^ 1)
            mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
            fill(k, b, g, tile_at(u, walk, BLOCK_K), k_tiles, k_full, stage)
        if u > 0:
            stage = (u - 1) % STAGES
            mbarrier.wait(v_empty.index(stage), (u - 1) // STAGES & 1 ^ 1)
            mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
            fill(v, b, g, tile_at(u - 1, walk, BLOCK_K), v_tiles, v_full, stage)


@gluon.jit
def _consume(
    tiles, barriers, where, state, sizes, span, scale, C: gl.constexpr, DV: gl.constexpr
):  # fmt: skip
    """Half of the program's rows: the C-th."""
    q_tiles, k_tiles, v_tiles = tiles
    out, lse, lse_batch, lse_head, result = state
    b, h, start, walk = where
    ROWS: gl.constexpr = q_tiles.shape[3]
    BLOCK_DV: gl.constexpr = v_tiles.shape[4]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, k_tiles.shape[3], 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    start = start + C * ROWS
    if out is None:
        acc = gl.zeros([ROWS, BLOCK_DV], gl.float32, A)
    else:
        at, inside = fragment(out, b, h, start, sizes.q_len, ROWS, DV, BLOCK_DV, A)
        acc = gl.load(at, mask=inside, other=0.0)
    if visits(walk) > 0:
        i = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        lse_at = lse + gl.cast(b, gl.int64) * lse_batch + gl.cast(h, gl.int64) * lse_head + i
        held = gl.load(lse_at, mask=i < sizes.q_len, other=0.0)
        seen = (span, ends_of(span, i, sizes.q_len), sizes.k_len, scale)
        acc, top, parts = _visit(acc, held * LOG2E, tiles, barriers, walk, seen, C, S, A)
        total = gl.convert_layout(gl.sum(parts, 1), gl.SliceLayout(1, S))
        total = gl.where(total == 0, 1.0, total)
        acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, A))[:, None]
        # what saw nothing keeps its lse to the bit
        same = (total == 1) & (top == held * LOG2E)
        after = gl.where(same, held, (top + gl.log2(total)) * LN2)
        gl.store(lse_at, after, mask=i < sizes.q_len)
    start = once_more(start)
    if result is not None:
        at, inside = fragment(result, b, h, start, sizes.q_len, ROWS, DV, BLOCK_DV, A)
        gl.store(at, acc.to(result.ptr.dtype.element_ty), mask=inside)
    elif visits(walk) > 0:
        at, inside = fragment(out, b, h, start, sizes.q_len, ROWS, DV, BLOCK_DV, A)
        gl.store(at, acc, mask=inside)


@gluon.jit
def _visit(
    acc, top, tiles, barriers, walk, seen, C: gl.constexpr, S: gl.constexpr, A: gl.constexpr
):  # fmt: skip
    """Let all keys of the walk into the accumulator, its maximum and the parts of its sum.

    Turns: consumer 0 begins; who has issued products hands the turn to the other.
    """
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, k_empty, v_full, v_empty, turn = barriers
    STAGES: gl.constexpr = k_tiles.shape[0]
    ROWS: gl.constexpr = q_tiles.shape[3]
    BLOCK_K: gl.constexpr = k_tiles.shape[3]
    zero = gl.zeros([ROWS, BLOCK_K], gl.float32, S)
    q = matrix(q_tiles, C)
    mbarrier.wait(q_full.index(C), 0)
    mbarrier.wait(k_full.index(0), 0)
    mbarrier.wait(turn.index(C), 1 - C)
    s = warpgroup_mma(q, matrix(k_tiles, 0).permute([1, 0]), zero, use_acc=False, is_async=True)
    mbarrier.arrive(turn.index(1 - C), count=1)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(0), count=1)
    p, top, total, shrink = _softmax(s, top, None, 0, walk, seen, BLOCK_K, S)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, A))[:, None]
    weights = gl.convert_layout(p.to(v_tiles.dtype), gl.DotOperandLayout(0, A, 2))
    last = visits(walk) - 1
    for u in range(1, last + 1):
        stage = u % STAGES
        before = (u - 1) % STAGES
        mbarrier.wait(k_full.index(stage), u // STAGES & 1)
        mbarrier.wait(turn.index(C), u & 1 ^ 1 - C)
        keys = matrix(k_tiles, stage).permute([1, 0])
        s = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), (u - 1) // STAGES & 1)
        acc = warpgroup_mma(weights, matrix(v_tiles, before), acc, is_async=True)
        mbarrier.arrive(turn.index(1 - C), count=1)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        p, top, total, shrink = _softmax(s, top, total, u, walk, seen, BLOCK_K, S)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, A))[:, None]
        weights = gl.convert_layout(p.to(v_tiles.dtype), gl.DotOperandLayout(0, A, 2))
    mbarrier.wait(v_full.index(last % STAGES), last // STAGES & 1)
    acc = warpgroup_mma(weights, matrix(v_tiles, last % STAGES), acc, is_async=True)
    return warpgroup_mma_wait(0, deps=[acc]), top, total


@gluon.jit
def _softmax(s, top, total, u, walk, seen, BLOCK_K: gl.constexpr, S: gl.constexpr):
    """Weights of the u-th tile of scores, and what they do to maximum, sum and accumulator."""
    span, ends, k_len, scale = seen
    if is_edge(u, walk):
        j = tile_at(u, walk, BLOCK_K) + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, S))
        s = gl.where(visible(span, ends, j, k_len), s, float("-inf"))
    higher = gl.maximum(top, gl.max(s, 1) * scale)
    # a row may still see nothing: its maximum -inf must not meet itself
    level = gl.where(higher == float("-inf"), 0.0, higher)
    p = gl.exp2(s * scale - level[:, None])
    shrink = gl.exp2(top - level)
    return p, higher, _parts(p, total, shrink), shrink


@gluon.jit
def _parts(p, total, shrink):
    """Sums of rows as far as each of a row's four threads has them: (rows, 4), joined at the end.

    A thread holds two columns in eight. ``total`` None: a sum of 1, in four parts.
    """
    ROWS: gl.constexpr = p.shape[0]
    found = gl.sum(gl.sum(p.reshape([ROWS, p.shape[1] // 8, 4, 2]), 3), 1)
    by_part = gl.convert_layout(shrink, gl.SliceLayout(1, found.type.layout))[:, None]
    if total is None:
        found += 0.25 * by_part
    else:
        found += total * by_part
    return found
