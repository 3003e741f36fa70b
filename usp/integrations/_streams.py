"""Two streams of tokens that attention joins: a rank's part of each, and each whole again."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from usp.distributed.mesh import degrees_and_place
from usp.integrations._answer import Tokens
from usp.integrations._boundary import Joint
from usp.nn.spread import Spread
from usp.planning.layout import Held, Layout
from usp.planning.shares import local_positions, shares


class Stream(NamedTuple):
    """Who holds what of one of two streams.

    Attributes:
        counts: Tokens of each rank of the mesh.
        places: (n,) int64 in the stream, rank by rank.
        ordered: Whether these ascend.
    """

    counts: tuple[int, ...]
    places: Tensor
    ordered: bool


def stream(tokens: Tokens, place: int) -> Stream:
    """The first or the second in the order of attention."""
    assert tokens.parts is not None
    degrees, _ = degrees_and_place(tokens.spread.mesh)
    made = torch.compiler.disable(_streams) if torch.compiler.is_compiling() else _streams
    if tokens.each is not None:
        return made(tokens.each, tokens.parts, degrees, True)[place]
    return made(tokens.spread.layout, tokens.parts, degrees, False)[place]


@lru_cache(maxsize=64)
def _streams(
    layout: Layout, lengths: tuple[int, int], degrees: tuple[int, int], each: bool
) -> tuple[Stream, Stream]:
    ranks = [(r, u) for r in range(degrees[0]) for u in range(degrees[1])]
    if each:
        held = [[local_positions(layout, n, *degrees, rank) for rank in ranks] for n in lengths]
    else:
        front, n = lengths[0], sum(lengths)
        both = [local_positions(layout, n, *degrees, rank) for rank in ranks]
        held = [[p[p < front] for p in both], [p[p >= front] - front for p in both]]
    places = [torch.cat(own) for own in held]
    first, second = (
        Stream(tuple(len(p) for p in own), all_of, bool((all_of.diff() > 0).all()))
        for own, all_of in zip(held, places, strict=True)
    )
    return first, second


def two_streams(spread: Spread, lengths: tuple[int, int], each: bool) -> Tokens:
    """Tokens of two streams in the order of attention.

    Args:
        spread: Of both, as one sequence.
        lengths: Of each.
        each: Whether each is cut by itself.

    Raises:
        ValueError: a rank would hold none of a stream where each is cut by itself.
    """
    if not each:
        return replace(Tokens.of(spread, ()), parts=lengths)
    degrees, _ = degrees_and_place(spread.mesh)
    pair = [shares(spread.layout, n, *degrees) for n in lengths]
    if 0 in pair[0] + pair[1]:
        raise ValueError(
            f"two streams of {lengths} tokens are cut each by itself, and ranks hold {pair[0]} and "
            f"{pair[1]} of them, where the model cannot do with none: take fewer ranks, or more "
            "tokens (padding)"
        )
    counts = tuple(a + b for a, b in zip(*pair, strict=True))
    own = replace(spread, layout=Held(counts))
    return replace(Tokens.of(own, ()), parts=lengths, ordered=len(counts) == 1, each=spread.layout)


def held_of(tokens: Tokens, place: int) -> int:
    """Tokens of a stream that this rank holds."""
    mesh = tokens.spread.mesh
    return stream(tokens, place).counts[0 if mesh is None else mesh.rank]


def cut_stream(tokens: Tokens, x: Tensor, dim: int, place: int) -> Tensor:
    """What this rank holds of a stream, or of entries for its tokens, that all hold whole."""
    counts, places, _ = stream(tokens, place)
    mesh = tokens.spread.mesh
    mine = places.split(counts)[0 if mesh is None else mesh.rank]
    return x.index_select(dim, mine.to(x.device))


def join_stream(tokens: Tokens, x: Tensor, dim: int, place: int) -> Tensor:
    """A stream whole on every rank; gradients of all copies add up."""
    _, places, ordered = stream(tokens, place)
    whole = alone(tokens, place).spread.unshard(x, dim)
    return whole if ordered else whole.index_select(dim, places.argsort().to(x.device))


def cut_both(tokens: Tokens, x: Tensor, dim: int) -> Tensor:
    """What this rank holds of entries for all tokens, whether of two streams or not."""
    if tokens.each is None or tokens.parts is None:
        return tokens.spread.shard(x, dim)
    two = enumerate(x.split(tokens.parts, dim))
    return torch.cat([cut_stream(tokens, part, dim, place) for place, part in two], dim)


def join_both(tokens: Tokens, x: Tensor, dim: int) -> Tensor:
    """The whole on every rank, whether of two streams or not."""
    if tokens.each is None or tokens.parts is None:
        return tokens.spread.unshard(x, dim)
    two = enumerate(x.split([held_of(tokens, 0), held_of(tokens, 1)], dim))
    return torch.cat([join_stream(tokens, part, dim, place) for place, part in two], dim)


def alone(tokens: Tokens, place: int) -> Tokens:
    """Tokens of one stream, as those of a sequence of its own."""
    counts, _, ordered = stream(tokens, place)
    spread = tokens.spread
    own = Spread(spread.mesh, Held(counts), validate=spread.validate)
    mine = counts[0 if spread.mesh is None else spread.mesh.rank]
    return Tokens(own, frozenset(), counts, mine, ordered=ordered)


class Counts(NamedTuple):
    """What each rank holds of a sequence, by which it is known again.

    Attributes:
        tokens: The sequence.
        first, second: Of its streams; of a single one the first, and None.
    """

    tokens: Tokens
    first: tuple[int, ...]
    second: tuple[int | None, ...]

    def alone(self, rank: int) -> set[int | None]:
        """How many tokens one tensor may have there: of a stream, or of both."""
        return {self.tokens.shares[rank], self.first[rank], self.second[rank]} - {None}

    def fits(self, rank: int, held: int | None, pair: tuple[int | None, int] | None) -> bool:
        """Whether what a module is given there, one tensor or both streams, may be of it."""
        if pair is None:
            return held in self.alone(rank)
        return pair == (self.first[rank], self.second[rank])

    def is_like(self, other: Counts, one_tensor: bool) -> bool:
        """Whether a rank cannot tell it from another; the same on all ranks."""
        if other.tokens is self.tokens:
            return False
        ranks = range(len(self.first))
        if one_tensor:
            return any(self.alone(rank) & other.alone(rank) for rank in ranks)
        pairs = (
            zip(self.first, self.second, strict=True),
            zip(other.first, other.second, strict=True),
        )
        return any(a == b for a, b in zip(*pairs, strict=True))


def counts(tokens: Tokens, joint: Joint | None) -> Counts:
    """Of a sequence that a trunk has seen."""
    if tokens.parts is None or joint is None:
        return Counts(tokens, tokens.shares, (None,) * len(tokens.shares))
    first, second = joint.ordered(*(stream(tokens, place).counts for place in (0, 1)))
    return Counts(tokens, first, second)
