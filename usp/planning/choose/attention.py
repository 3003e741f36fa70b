"""How long one layer's attention takes on a mesh, and what it sends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from usp.planning.choose.cluster import Cluster
from usp.planning.choose.network import ALONE, Group, all_to_all, gather, hop
from usp.planning.choose.steps import Steps, steps_of
from usp.planning.cost import Bytes, Place, Shape, exchange_sent
from usp.planning.heads import split_heads
from usp.planning.masks.mask import Mask
from usp.planning.problem import state_dtype

# Products of a visible pair, in units of D: 2 FLOP each of q k and p v; a backward has five.
_FORWARD, _BACKWARD = 4, 10
_CALLS = 3  # kernels of a step: pack, attend, merge


@dataclass(frozen=True)
class Way:
    """How a sequence lies on its ranks.

    Attributes:
        ring, ulysses: The ranks of the two axes, and how far they are apart.
        layout, transport: As in ``usp.long_context_attention``.
    """

    ring: Group = ALONE
    ulysses: Group = ALONE
    layout: str = "contiguous"
    transport: str = "ring"


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
    """Of the rank with most heads: FLOP of a pair; bytes of a row of sums, keys, gradients."""

    pair: float
    sums: float
    keys: float
    gradients: float


def _widths(shape: Shape, ulysses: int, backward: bool) -> _Widths:
    heads = split_heads(shape.num_heads, shape.num_kv_heads, ulysses)[0]
    first, stop = heads.kv_range
    dims, wide = shape.head_dim + shape.value_head_dim, state_dtype(shape.dtype).itemsize
    of_pair = (_BACKWARD if backward else _FORWARD) * dims / 2
    out = shape.head_dim if backward else shape.value_head_dim + 1
    return _Widths(
        of_pair * heads.count * shape.batch,
        out * wide * heads.count * shape.batch,
        dims * shape.dtype.itemsize * (stop - first) * shape.batch,
        dims * wide * (stop - first) * shape.batch if backward else 0,
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
    ring = way.ring.size
    width = _widths(shape, way.ulysses.size, backward)
    lengths = shape.query_len, shape.key_len
    ranks = steps_of(mask, way.layout, lengths, ring, way.transport)
    each = [_ring_seconds(steps, width, way, cluster) for steps in ranks]
    compute, merge, waits = max(each, key=sum)
    sent = exchange_sent(shape, _place(mask, way), backward) if way.ulysses.size > 1 else 0
    exchange = 2 * all_to_all(cluster, way.ulysses, sent / 2)
    return Seconds(compute, merge, exchange, waits)


def _place(mask: Mask, way: Way) -> Place:
    """The rank that has most heads."""
    return Place(way.ring.size, way.ulysses.size, 0, 0, way.layout, mask, way.transport)


def _ring_seconds(
    steps: Steps, width: _Widths, way: Way, cluster: Cluster
) -> tuple[float, float, float]:
    """Kernels, sums, and what messages add."""
    works = [pairs * width.pair / cluster.attention_rate for pairs in steps.pairs]
    launches = cluster.call + _CALLS * cluster.launch * len(works)
    if way.ring.size == 1:
        return sum(works) + launches, 0.0, 0.0
    rows = steps.queries  # keys of a row are about as many
    of_step = (2 * rows * width.sums + 2 * rows * width.gradients) / cluster.memory_rate
    sums = [of_step] * len(works)
    message = width.keys + width.gradients
    if way.transport == "ring":
        moves = [hop(cluster, way.ring, come * message) for come in steps.rows]
    else:
        moves = [_collective(steps, message, way, cluster)]
    waits = 0.0
    for i, move in enumerate(moves):
        work = works[i] + sums[i] if i < len(works) else 0.0
        waits += max(0.0, move - work) + cluster.contention * min(move, work)
    return sum(works) + launches, sum(sums), waits


def _collective(steps: Steps, message: float, way: Way, cluster: Cluster) -> float:
    """All rows at once, of which the own keys hide some."""
    if way.transport == "allgather":
        ring = way.ring.size
        return gather(cluster, way.ring, ring / (ring - 1) * sum(steps.rows) * message)
    return all_to_all(cluster, way.ring, max(steps.sent, sum(steps.rows)) * message)


def attention_bytes(shape: Shape, mask: Mask, way: Way, backward: bool = False) -> Bytes:
    """What leaves the rank that sends most, by the formulas of ``planning.cost``."""
    width = _widths(shape, way.ulysses.size, backward)
    lengths = shape.query_len, shape.key_len
    ranks = steps_of(mask, way.layout, lengths, way.ring.size, way.transport)
    exchange = exchange_sent(shape, _place(mask, way), backward) if way.ulysses.size > 1 else 0
    each = [(steps.sent * width.keys, steps.returned * width.gradients) for steps in ranks]
    blocks, gradients = max(each, key=sum)
    return Bytes(exchange, round(blocks), round(gradients))


def message_between(shape: Shape, mask: Mask, way: Way) -> float:
    """Bytes of the largest message of keys in a forward: a hop's, or of all in one collective."""
    width = _widths(shape, way.ulysses.size, False)
    lengths = shape.query_len, shape.key_len
    rows = steps_of(mask, way.layout, lengths, way.ring.size, way.transport)[0].rows
    if not rows:
        return 0.0
    return (max(rows) if way.transport == "ring" else sum(rows)) * width.keys
