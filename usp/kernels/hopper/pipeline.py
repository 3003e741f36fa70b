"""What the Hopper kernels share: their walk over tiles, masks, fragments, a consumer's rows.

A program is three partitions: a warp that issues TMA loads, and two warpgroups that multiply.
Each stage of a ring of tiles in shared memory has a barrier ``full``, which a load completes, and
a barrier ``empty``, at which both consumers arrive when they have read it. The n-th use of a stage
waits for parity ``n & 1`` of full and, before it is written, for the other parity of empty: a new
barrier counts as completed at parity 1.

B batch, L rows, H query heads, G key heads, X head dim.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from usp.kernels.tiles import base, ranges

# its name until Triton 3.8
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def walk_of(span, start, length, other_len, BLOCK: gl.constexpr, STEP: gl.constexpr):
    """Which tiles of the other side the rows of a tile visit, from the last to the first.

    Returns:
        resume, right, full_begin, full, begin, left: where each run starts, and its tiles. The
        middle one needs no mask.
    """
    lanes = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [4], [0]))
    begin, full_begin, full_end, resume, end = ranges(
        span, start, length, other_len, BLOCK, STEP, STEP, lanes
    )
    right = gl.maximum(gl.cdiv(end - resume, STEP), 0)
    full = (full_end - full_begin) // STEP
    left = gl.maximum(gl.cdiv(full_begin - begin, STEP), 0)
    return resume, right, full_begin, full, begin, left


@gluon.jit
def visits(walk):
    """How many tiles there are to visit."""
    return walk[1] + walk[3] + walk[5]


@gluon.jit
def tile_at(u, walk, STEP: gl.constexpr):
    """First row of the u-th tile to visit, the last one first: it is masked where causal."""
    resume, right, full_begin, full, begin, left = walk
    start = resume + (right - 1 - u) * STEP
    if u >= right:
        start = full_begin + (right + full - 1 - u) * STEP
    if u >= right + full:
        start = begin + (right + full + left - 1 - u) * STEP
    return start


@gluon.jit
def is_edge(u, walk):
    """Whether the u-th tile needs a mask."""
    return (u < walk[1]) | (u >= walk[1] + walk[3])


@gluon.jit
def ends_of(span, i, length):
    """``first, stop`` of some rows; empty where there is no row."""
    if span is None:
        first = i
        stop = i
    else:
        first = gl.load(span.first + i, mask=i < length, other=0)
        stop = gl.load(span.stop + i, mask=i < length, other=0)
    return first, stop


@gluon.jit
def visible(span, ends, j, other_len):
    """Which of the columns ``j`` of a tile its rows see."""
    if span is None:
        seen = (j < other_len)[None, :]
    else:
        first, stop = ends
        seen = (j[None, :] >= first[:, None]) & (j[None, :] < stop[:, None])
    return seen


@gluon.jit
def fragment(
    x, b, h, start, length, ROWS: gl.constexpr, X: gl.constexpr, BLOCK_X: gl.constexpr,
    L: gl.constexpr,
):  # fmt: skip
    """Pointers to a tile of rows as an accumulator holds it, and which of them exist."""
    i = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    columns = gl.arange(0, BLOCK_X, layout=gl.SliceLayout(0, L))
    at = (base(x, b, h) + i.to(gl.int64) * x.row)[:, None] + columns[None, :]
    inside = (i < length)[:, None]
    if X != BLOCK_X:
        inside = inside & (columns < X)[None, :]
    return at, inside


@gluon.jit
def once_more(x):
    """A scalar that the compiler cannot know to be the same.

    Addresses made from it at the end of a kernel are made there, rather than kept in registers
    since the state was loaded from them.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def new_barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    """Barriers whose phase ends with ``COUNT`` arrivals, and the bytes that are expected."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for x in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(x), count=COUNT)
    return barriers


@gluon.jit
def new_tiles(desc, NUMBER: gl.constexpr):
    """Shared memory for tiles of a descriptor."""
    ROWS: gl.constexpr = desc.block_type.shape[2]
    X: gl.constexpr = desc.block_type.shape[3]
    return gl.allocate_shared_memory(desc.dtype, [NUMBER, 1, 1, ROWS, X], desc.layout)


@gluon.jit
def new_rows(dtype: gl.constexpr, NUMBER: gl.constexpr, LENGTH: gl.constexpr):
    """Shared memory for a number of each row."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(dtype, [NUMBER, LENGTH], flat)


@gluon.jit
def matrix(tiles, index):
    """A tile as rows by columns."""
    return tiles.index(index).reshape([tiles.shape[3], tiles.shape[4]])


@gluon.jit
def fill(desc, b, h, start, tiles, full, index):
    """Load the tile at ``start`` of one head; its barrier already expects it."""
    async_load(desc, [b, h, start, 0], full.index(index), tiles.index(index))
