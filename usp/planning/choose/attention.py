"""How long one layer's attention takes on a mesh, and what it sends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from usp.planning.choose.cluster import Cluster
from usp.planning.choose.network import ALONE, Group, all_to_all, gather, hop
from usp.planning.choose.steps import Steps, steps_of
from usp.planning.cost import Bytes, Place, Shape, bytes_sent, exchange_sent
from usp.planning.heads import split_heads
from usp.planning.layout import Layout
from usp.planning.masks.mask import Mask
from usp.planning.problem import state_dtype
from usp.planning.sides import Sizes, Width

# Products of a visible pair, in units of D: 2 FLOP each of q k and p v; a backward has five.
_FORWARD, _BACKWARD = 4, 10
CALLS_OF_STEP = 3  # kernels of a step: pack, attend, merge


@dataclass(frozen=True)
class Way:
    """How a sequence lies on its ranks.

    Attributes:
        ring, ulysses: The ranks of the two axes, and how far they are apart.
        layout, transport: As in ``usp.long_context_attention``.
        outer: Nodes of a ring of two levels; 1 is a plain one.
    """

    ring: Group = ALONE
    ulysses: Group = ALONE
    layout: Layout = "contiguous"
    transport: str = "ring"
    outer: int = 1

    @property
    def levels(self) -> tuple[Group, Group]:
        """Of a ring of two levels, ranks of a node and those of one place in theirs."""
        inner = self.ring.size // self.outer
        stride = self.ring.stride
        return Group(inner, stride), Group(self.outer, stride * inner)

    @property
    def is_exact(self) -> bool:
        """Whether its bytes are counted rank by rank, for want of a formula."""
        return self.outer > 1 or self.transport in ("query_ring", "grid")


@dataclass(frozen=True)
class Seconds:
    """Of one layer in one pass, on the slowest rank.

    Attributes:
        compute: Kernels of attention.
        merge: Sums that each step of a ring reads and writes again.
        exchange: Heads before and after.
        ring: Keys and gradients on their way that nothing hides, and what hiding costs.
    """

    compute: float
    merge: float
    exchange: float
    ring: float

    @property
    def total(self) -> float:
        return self.compute + self.merge + self.exchange + self.ring


@dataclass(frozen=True)
class _Widths:
    """Of the rank with most heads: FLOP of a pair; bytes of a row of sums, keys, gradients, and
    of queries there and back where they travel."""

    pair: float
    sums: float
    keys: float
    gradients: float
    queries: Width


def _widths(shape: Shape, ulysses: int, backward: bool) -> _Widths:
    heads = split_heads(shape.num_heads, shape.num_kv_heads, ulysses)[0]
    first, stop = heads.kv_range
    dims, wide = shape.head_dim + shape.value_head_dim, state_dtype(shape.dtype).itemsize
    of_pair = (_BACKWARD if backward else _FORWARD) * dims / 2
    out = shape.head_dim if backward else shape.value_head_dim + 1
    keys = shape.key_width * (stop - first if shape.latent_width is None else 1)
    dim, value_dim = shape.head_dim, shape.value_head_dim
    sizes = Sizes(shape.batch, heads.count, keys, dim, value_dim, shape.dtype)
    there = sizes.of_queries(backward)
    return _Widths(
        of_pair * heads.count * shape.batch,
        out * wide * heads.count * shape.batch,
        keys * shape.dtype.itemsize * shape.batch,
        keys * wide * shape.batch if backward else 0,
        Width(shape.batch * there.there, shape.batch * there.back),
    )


@lru_cache(maxsize=16384)
def attention_seconds(
    shape: Shape, mask: Mask, way: Way, cluster: Cluster, backward: bool = False
) -> Seconds:
    """One pass of one layer.

    The ring hides what fits behind the step before it; ``cluster.contention`` of what is hidden is
    paid for all the same. Each step reads and writes fp32 sums of its queries, and in a backward
    those of its keys.
    """
    width = _widths(shape, way.ulysses.size, backward)
    each = [_ring_seconds(steps, width, way, cluster) for steps in _steps(shape, mask, way)]
    compute, merge, waits = max(each, key=sum)
    sent = exchange_sent(shape, _place(mask, way), backward) if way.ulysses.size > 1 else 0
    exchange = 2 * all_to_all(cluster, way.ulysses, sent / 2)
    return Seconds(compute, merge, exchange, waits)


def _steps(shape: Shape, mask: Mask, way: Way) -> tuple[Steps, ...]:
    carrier = way.transport if way.transport in ("direct", "allgather") else "ring"
    return steps_of(mask, way.layout, (shape.query_len, shape.key_len), way.ring.size, carrier)


def _place(mask: Mask, way: Way, ring_rank: int = 0) -> Place:
    """A rank that has most heads."""
    degrees = way.ring.size, way.ulysses.size
    return Place(*degrees, ring_rank, 0, way.layout, mask, way.transport, way.outer)


def _ring_seconds(
    steps: Steps, width: _Widths, way: Way, cluster: Cluster
) -> tuple[float, float, float]:
    """Kernels, sums, and what messages add."""
    works = [pairs * width.pair / cluster.attention_rate for pairs in steps.pairs]
    launches = cluster.call + CALLS_OF_STEP * cluster.launch * len(works)
    if way.ring.size == 1:
        return sum(works) + launches, 0.0, 0.0
    rows = steps.queries  # keys of a row are about as many
    of_step = (2 * rows * width.sums + 2 * rows * width.gradients) / cluster.memory_rate
    busy = [work + of_step for work in works]
    message = width.keys + width.gradients
    if way.transport == "query_ring" and width.gradients:
        message = width.queries.both
    if way.transport == "grid":
        waits = _grid_waits(steps, busy, width, way, cluster)
    elif way.outer > 1:
        waits = _double_ring_waits(steps, busy, message, way, cluster)
    elif way.transport in ("ring", "query_ring"):
        moves = [hop(cluster, way.ring, come * message) for come in steps.rows]
        behind = [*busy, *[0.0] * len(moves)]
        waits = sum(map(_added, moves, behind, [cluster] * len(moves)))
    else:
        waits = _added(_collective(steps, message, way, cluster), busy[0], cluster)
    return sum(works) + launches, of_step * len(works), waits


def _added(move: float, work: float, cluster: Cluster) -> float:
    """What a message adds to the work that hides it."""
    return max(0.0, move - work) + cluster.contention * min(move, work)


def _double_ring_waits(
    steps: Steps, busy: list[float], message: float, way: Way, cluster: Cluster
) -> float:
    """Blocks go round in each node while the next ones come over the network, to all at once."""
    inside, between = way.levels
    come = max(steps.rows, default=0.0) * message
    turn, cross = hop(cluster, inside, come), hop(cluster, between, come)
    waits = 0.0
    for node in range(way.outer):
        works = busy[node * inside.size : (node + 1) * inside.size]
        waits += sum(_added(turn, work, cluster) for work in works[:-1])
        if node + 1 < way.outer:
            waits += _added(cross, sum(works), cluster)
    return waits


def _grid_waits(
    steps: Steps, busy: list[float], width: _Widths, way: Way, cluster: Cluster
) -> float:
    """Queries come from the node behind the first tile, and what was found goes home behind
    nothing; keys cross behind the tiles of a node."""
    inside, between = way.levels
    others, rows = inside.size - 1, steps.queries
    there = all_to_all(cluster, inside, others * rows * width.queries.there)
    back = all_to_all(cluster, inside, others * rows * width.queries.back)
    cross = hop(cluster, between, rows * (width.keys + width.gradients))
    tiles = sum(busy) / way.outer
    return (
        _added(there, tiles / inside.size, cluster)
        + back
        + (way.outer - 1) * _added(cross, tiles, cluster)
    )


def _collective(steps: Steps, message: float, way: Way, cluster: Cluster) -> float:
    """All rows at once, of which the own keys hide some."""
    if way.transport == "allgather":
        ring = way.ring.size
        return gather(cluster, way.ring, ring / (ring - 1) * sum(steps.rows) * message)
    return all_to_all(cluster, way.ring, max(steps.sent, sum(steps.rows)) * message)


def attention_bytes(shape: Shape, mask: Mask, way: Way, backward: bool = False) -> Bytes:
    """What leaves the rank that sends most, by the formulas of ``planning.cost``."""
    if way.is_exact:
        ring = way.ring.size
        ranks = {0, 1, ring // 2, ring - 2, ring - 1} & set(range(ring))
        each = [bytes_sent(shape, _place(mask, way, rank), backward) for rank in sorted(ranks)]
        return max(each, key=lambda sent: sent.total)
    width = _widths(shape, way.ulysses.size, backward)
    exchange = exchange_sent(shape, _place(mask, way), backward) if way.ulysses.size > 1 else 0
    each_ring = [
        (steps.sent * width.keys, steps.returned * width.gradients)
        for steps in _steps(shape, mask, way)
    ]
    blocks, gradients = max(each_ring, key=sum)
    return Bytes(exchange, round(blocks), round(gradients))


def message_between(shape: Shape, mask: Mask, way: Way) -> float:
    """Bytes of the largest message of keys in a forward: a hop's, or of all in one collective."""
    width = _widths(shape, way.ulysses.size, False)
    rows = _steps(shape, mask, way)[0].rows
    if not rows:
        return 0.0
    return (sum(rows) if way.transport in ("direct", "allgather") else max(rows)) * width.keys
