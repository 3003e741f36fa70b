"""Bytes that leave a rank, by formula: what the exchange and the ring must send, no more; and
those of a bias that it holds, which grow with the square of the length.

The tests count what is really sent and compare; ``usp plan`` and ``usp demo`` print both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from usp.planning.double_ring import DoubleRing
from usp.planning.grid import make_grid
from usp.planning.heads import kv_heads_shared, split_heads
from usp.planning.layout import Layout, Layouts, Replicated, both, replicated
from usp.planning.masks.mask import Everything, Mask
from usp.planning.plan import make_plan
from usp.planning.problem import state_dtype
from usp.planning.query_ring import make_query_ring
from usp.planning.route import Route, Sent, of_keys, of_query_steps
from usp.planning.samples import Masks, masks_of
from usp.planning.shares import pieces, row_pieces
from usp.planning.sides import Moves, Sizes, Width, which_move


@dataclass(frozen=True)
class Bias:
    """An additive bias.

    Attributes:
        dims: Letters of the dims in which it is not broadcast, out of "bhq": samples, heads,
            queries. It always has all keys.
        dtype: Of the bias itself; its gradient has that of the state.
        gradient: Whether it has one.
    """

    dims: str
    dtype: torch.dtype
    gradient: bool = False


@dataclass(frozen=True)
class Shape:
    """A whole attention.

    Attributes:
        batch, query_len, key_len: Of the whole sequences.
        num_heads, num_kv_heads, head_dim, value_head_dim: H, G, D, Dv.
        dtype: Of q, k and v.
        key_padding_mask, return_lse: Whether these travel too (lse with its gradient).
        bias: What is added to the scores, if anything.
        latent_width: Numbers of a token that keys and values of all heads are made of where they
            are used (MLA), with the rotary ones; None where keys and values travel.
    """

    batch: int
    query_len: int
    key_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: torch.dtype
    key_padding_mask: bool = False
    return_lse: bool = False
    bias: Bias | None = None
    latent_width: int | None = None

    @property
    def key_heads(self) -> int:
        """Heads of what travels of keys and values."""
        return self.num_kv_heads if self.latent_width is None else 1

    @property
    def key_width(self) -> int:
        """Numbers of each."""
        of_head = self.head_dim + self.value_head_dim
        return of_head if self.latent_width is None else self.latent_width


@dataclass(frozen=True)
class Bytes:
    """Bytes that one rank sends to others in one pass.

    Attributes:
        exchange: Heads, before and after the ring.
        blocks: Keys and values along the ring.
        gradients: Their gradients on the way home.
        bias: Rows of the bias before the ring, or of its gradient after it.
    """

    exchange: int
    blocks: int
    gradients: int = 0
    bias: int = 0

    @property
    def total(self) -> int:
        return self.exchange + self.blocks + self.gradients + self.bias


@dataclass(frozen=True)
class Place:
    """One rank of a mesh, and how sequences lie on it."""

    ring_degree: int
    ulysses_degree: int
    ring_rank: int
    ulysses_rank: int
    layout: Layouts = "contiguous"
    mask: Mask | Sequence[Mask] = field(default_factory=Everything)
    transport: str = "auto"
    ring_outer_degree: int = 1


def bytes_sent(shape: Shape, place: Place, backward: bool = False) -> Bytes:
    """Bytes that leave ``place`` in one forward, or in one backward.

    For n_q, n_k local tokens of a row of N_q, N_k, H_u query heads and G_j key heads of rank j:
    the exchange sends ``n_q (H - H_u) D`` of q, ``n_k sum_{j != u} G_j (D + Dv)`` of k and v and
    ``(N_q - n_q) H_u Dv`` of out; a message of n rows of keys ``n G_u (D + Dv)``. The backward
    mirrors the exchange, sends the same rows again, and fp32 gradients of those that came home.
    Where queries move, n rows are ``n H_u D`` there and fp32 ``n H_u (Dv + 1)`` back; in a backward
    ``n H_u (D + Dv)`` and fp32 ``2 n H_u`` there, and fp32 ``n H_u D`` back.
    Of a bias with rows and heads, for S keys, the exchange sends ``n_q (H - H_u) S`` and of its
    gradient ``(N_q - n_q) H_u S``; without heads it goes whole to every rank of the row.

    Where keys are on every rank nothing is sent. Where queries are, n of the N rows (a head of a
    query each) are combined here along each axis of P ranks: ``(N - n) (Dv + 1)`` fp32 there,
    ``n (P - 1) (Dv e + 4)`` back.
    """
    layouts = both(place.layout)
    if replicated(layouts):
        of_queries = isinstance(layouts[0], Replicated)
        return Bytes(0, _all_reduced(shape, place, backward) if of_queries else 0)
    exchange = exchange_sent(shape, place, backward)
    blocks, gradients = _moved(shape, place, backward)
    return Bytes(exchange, blocks, gradients, _bias_sent(shape, place, backward))


def bytes_between_nodes(shape: Shape, place: Place, nodes: int, backward: bool = False) -> Bytes:
    """Of what ``bytes_sent`` counts along the ring, what leaves the node of ``place``.

    With n rows of keys on each of R ranks that need all, every rank of a double ring over as many
    nodes sends ``(nodes - 1) n`` rows; of a plain one the first and the last rank of each node,
    ``(R - 1) n`` together, and the others none.

    Args:
        nodes: So many runs of ring ranks, as long as each other, are a node each; exchanges of
            heads stay inside.
    """
    if replicated(both(place.layout)):
        raise NotImplementedError("what is on every rank is reduced along whole axes, in any order")
    return Bytes(0, *_moved(shape, place, backward, place.ring_degree // nodes))


def exchange_sent(shape: Shape, place: Place, backward: bool = False) -> int:
    """The part of ``bytes_sent`` that the head exchange is."""
    return _exchange_back(shape, place) if backward else _exchange(shape, place)


def bias_held(shape: Shape, place: Place) -> tuple[int, int]:
    """Bytes of the bias that ``place`` computes with, and of its gradient meanwhile.

    They are those of its own heads, for all queries of its row, and all keys. The bias stays
    until the backward; where its rows are exchanged it is a copy, beside what the caller holds.
    """
    bias = shape.bias
    if bias is None:
        return 0, 0
    rows, heads = _bias_parts(bias, shape, place)
    queries, own = sum(_row(shape, place)[0]), _counts(shape, place)[0]
    values = shape.batch if "b" in bias.dims else 1
    values *= (own if heads else 1) * (queries if rows else 1) * shape.key_len
    wide = state_dtype(shape.dtype).itemsize
    return values * bias.dtype.itemsize, values * wide if bias.gradient else 0


def _bias_parts(bias: Bias, shape: Shape, place: Place) -> tuple[bool, bool]:
    """Whether it counts as one with rows, and with heads: a single one is as good as its own."""
    single = set(_row(shape, place)[0]) == {1}
    return "q" in bias.dims or single, "h" in bias.dims or shape.num_heads == 1


def _bias_sent(shape: Shape, place: Place, backward: bool) -> int:
    """Of the bias; nothing where all queries share a row. It never travels along the ring."""
    bias, (queries, _) = shape.bias, _row(shape, place)
    if bias is None or (backward and not bias.gradient):
        return 0
    rows, heads = _bias_parts(bias, shape, place)
    if not rows:
        return 0
    mine, own = queries[place.ulysses_rank], _counts(shape, place)[0]
    if backward:
        values = (sum(queries) - mine) * (own if heads else 1)
    else:
        values = mine * (shape.num_heads - own if heads else place.ulysses_degree - 1)
    size = state_dtype(shape.dtype).itemsize if backward else bias.dtype.itemsize
    return (shape.batch if "b" in bias.dims else 1) * values * shape.key_len * size


def _all_reduced(shape: Shape, place: Place, backward: bool) -> int:
    """Results of queries that are on every rank, or their gradients: along each axis other ranks'
    pieces go to them, and the own one, combined, to all."""
    total, dtype = 0, shape.dtype.itemsize
    wide = state_dtype(shape.dtype).itemsize
    lse = wide if shape.return_lse or not backward else 0
    axes = [(place.ulysses_degree, place.ulysses_rank), (place.ring_degree, place.ring_rank)]
    axes, rows = [axis for axis in axes if axis[0] > 1], shape.query_len * shape.num_heads
    for i, (degree, rank) in enumerate(axes):
        mine = pieces(rows, degree)[rank]
        # what is combined is not rounded before the last axis is done
        there = shape.value_head_dim * (dtype if backward and i == 0 else wide) + lse
        back = shape.value_head_dim * (dtype if i == len(axes) - 1 else wide) + lse
        total += (rows - mine) * there + mine * (degree - 1) * back
    return shape.batch * total


def _row(shape: Shape, place: Place) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Queries and keys of each rank of the row; just the own where heads change no hands."""
    degrees = place.ring_degree, place.ulysses_degree
    queries, keys = (
        row_pieces(layout, length, *degrees)[place.ring_rank]
        for layout, length in zip(both(place.layout), (shape.query_len, shape.key_len), strict=True)
    )
    if replicated(both(place.layout)):
        return queries[place.ulysses_rank :][:1], keys[place.ulysses_rank :][:1]
    return queries, keys


def _counts(shape: Shape, place: Place) -> tuple[int, list[int], bool]:
    """Own query heads, key heads of each rank of the row, whether some are shared."""
    u, degree = place.ulysses_rank, place.ulysses_degree
    if replicated(both(place.layout)):
        u, degree = 0, 1
    heads = split_heads(shape.num_heads, shape.key_heads, degree)
    kv = [stop - first for first, stop in (h.kv_range for h in heads)]
    return heads[u].count, kv, kv_heads_shared(heads)


def _exchange(shape: Shape, place: Place) -> int:
    queries, keys = _row(shape, place)
    own, kv, _ = _counts(shape, place)
    u, size = place.ulysses_rank, shape.dtype.itemsize
    others = place.ulysses_degree - 1
    q = queries[u] * (shape.num_heads - own) * shape.head_dim * size
    k_v = keys[u] * (sum(kv) - kv[u]) * shape.key_width * size
    out = (sum(queries) - queries[u]) * own * shape.value_head_dim * size
    mask = keys[u] * others if shape.key_padding_mask else 0
    lse = (sum(queries) - queries[u]) * own * state_dtype(shape.dtype).itemsize
    return shape.batch * (q + k_v + mask + out + (lse if shape.return_lse else 0))


def _exchange_back(shape: Shape, place: Place) -> int:
    queries, keys = _row(shape, place)
    own, kv, shared = _counts(shape, place)
    u, size, wide = place.ulysses_rank, shape.dtype.itemsize, state_dtype(shape.dtype).itemsize
    dout = queries[u] * (shape.num_heads - own) * shape.value_head_dim * size
    dlse = queries[u] * (shape.num_heads - own) * wide
    dq = (sum(queries) - queries[u]) * own * shape.head_dim * size
    # Gradients of shared key heads are summed on arrival, in fp32.
    dk_dv = (sum(keys) - keys[u]) * kv[u] * shape.key_width
    dk_dv *= wide if shared or shape.latent_width is not None else size
    return shape.batch * (dout + (dlse if shape.return_lse else 0) + dq + dk_dv)


def _moved(
    shape: Shape, place: Place, backward: bool, node_size: int | None = None
) -> tuple[int, int]:
    """Along the ring: keys and values or queries, and in a backward their gradients.

    Args:
        node_size: Only what leaves the node, of so many ranks of the ring; None for all.
    """
    what, mine = _what(shape, place), place.ring_rank
    sizes, outer = _sizes(shape, place), place.ring_outer_degree
    moves = what_moves(shape, place)
    queries, keys = sizes.of_queries(backward), sizes.of_keys(backward)
    mask = 1 if shape.key_padding_mask else 0
    # along which axes, by which route, how wide
    moved: list[tuple[Axes, Route | DoubleRing | None, Width]] = []
    by_key = Width(keys.there + mask, keys.back)
    move = moves.backward if backward else moves.forward
    if move == "both":
        grid, inner = make_grid(*what, mine, outer), place.ring_degree // outer
        moved.append((Axes(inner, mine % inner), grid.plans[0].route, by_key))
        moved.append((Axes(1, mine // inner * inner), grid.query_route, queries))
    elif move == "queries":
        as_forward = moves.forward == "queries" and not 1 < outer < place.ring_degree
        name = of_query_steps(place.transport) if backward and not as_forward else "direct"
        grid = make_query_ring(*what, mine, name, outer if backward else 1)
        moved.append((Axes(1, 0), grid.query_route, queries))
    else:
        plan = make_plan(*what, mine, of_keys(place.transport), outer)
        moved.append((Axes(1, 0), plan.route, by_key))
    batches = [part.samples.count(shape.batch) for part in what[0]]

    def rows(messages: Sent, axes: Axes) -> int:
        return sum(
            count * len(some)
            for to, cargo in messages
            for count, some in zip(batches, cargo, strict=True)
            if node_size is None or axes.rank(to) // node_size != mine // node_size
        )

    there = back = 0
    for axes, route, width in moved:
        if route is not None:
            place_in = axes.place(mine)
            there += rows(route.sent(place_in), axes) * width.there
            back += rows(route.returned(place_in), axes) * width.back if width.back else 0
    return (there, back) if backward else (there + back, 0)


class Axes(NamedTuple):
    """Ranks of the ring at so many places from each other, from a first one on."""

    stride: int
    first: int

    def rank(self, place: int) -> int:
        return self.first + place * self.stride

    def place(self, rank: int) -> int:
        return (rank - self.first) // self.stride


def _what(shape: Shape, place: Place) -> tuple[Masks, tuple[Layout, Layout], tuple[int, int], int]:
    lengths = shape.query_len, shape.key_len
    return masks_of(place.mask), both(place.layout), lengths, place.ring_degree


def _sizes(shape: Shape, place: Place) -> Sizes:
    own, kv, _ = _counts(shape, place)
    dims = shape.head_dim, shape.value_head_dim
    width = kv[place.ulysses_rank] * shape.key_width
    return Sizes(shape.batch, own, width, *dims, shape.dtype)


def what_moves(shape: Shape, place: Place) -> Moves:
    """Whether keys move along the ring, queries, or both."""
    if place.ring_degree == 1 or replicated(both(place.layout)):
        return Moves("keys", "keys")
    what, has_bias = _what(shape, place), shape.bias is not None
    outer = place.ring_outer_degree if shape.latent_width is None else 1
    return which_move(place.transport, what, _sizes(shape, place), has_bias, outer)
