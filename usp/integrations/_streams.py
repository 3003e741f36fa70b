"""Two streams of tokens that attention joins: a rank's part of each, and each whole again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from usp.distributed.mesh import degrees_and_place
from usp.integrations._answer import Tokens
from usp.integrations._boundary import Joint
from usp.nn.spread import Spread
from usp.planning.layout import Held
from usp.planning.shares import local_positions


@dataclass(frozen=True, eq=False)
class Stream:
    """Who holds what of one of two streams.

    Attributes:
        counts: Tokens of each rank of the mesh.
        mine: (n,) int64, what this rank holds of it.
        back: (tokens of the stream,) int64, where each is when the ranks' are joined one behind the
            other; None where that is their order.
        alone: The stream as a sequence of its own.
    """

    counts: tuple[int, ...]
    mine: Tensor
    back: Tensor | None
    alone: Tokens


def two_streams(spread: Spread, lengths: tuple[int, int], each: bool) -> Tokens:
    """Tokens of two streams in the order of attention.

    Args:
        spread: Of both, as one sequence.
        lengths: Of each.
        each: Whether each is cut by itself.

    Raises:
        ValueError: a rank would hold none of a stream where each is cut by itself.
    """
    if torch.compiler.is_compiling():
        return cast(Tokens, torch.compiler.disable(_two_streams)(spread, lengths, each))
    return _two_streams(spread, lengths, each)


def _two_streams(spread: Spread, lengths: tuple[int, int], each: bool) -> Tokens:
    degrees, _ = degrees_and_place(spread.mesh)
    ranks = [(r, u) for r in range(degrees[0]) for u in range(degrees[1])]
    if not each:
        both = [local_positions(spread.layout, sum(lengths), *degrees, rank) for rank in ranks]
        front = [p[p < lengths[0]] for p in both]
        behind = [p[p >= lengths[0]] - lengths[0] for p in both]
        streams = _stream(spread, front), _stream(spread, behind)
        return replace(Tokens.of(spread, ()), parts=lengths, streams=streams)
    held = [[local_positions(spread.layout, n, *degrees, rank) for rank in ranks] for n in lengths]
    first, second = (_stream(spread, own) for own in held)
    if 0 in first.counts + second.counts:
        raise ValueError(
            f"two streams of {lengths} tokens are cut each by itself, and ranks hold "
            f"{first.counts} and {second.counts} of them, where the model cannot do with none: "
            "take fewer ranks, or more tokens (padding)"
        )
    counts = tuple(a + b for a, b in zip(first.counts, second.counts, strict=True))
    tokens = Tokens.of(replace(spread, layout=Held(counts)), ())
    return replace(
        tokens, parts=lengths, ordered=len(ranks) == 1, each=True, streams=(first, second)
    )


def _stream(spread: Spread, held: list[Tensor]) -> Stream:
    """Of its places that each rank holds."""
    mesh, places = spread.mesh, torch.cat(held)
    rank = 0 if mesh is None else mesh.rank
    ordered = bool((places.diff() > 0).all())
    counts = tuple(len(own) for own in held)
    own = Spread(mesh, Held(counts), validate=spread.validate)
    alone = Tokens(own, frozenset(), counts, counts[rank], ordered=ordered)
    return Stream(counts, held[rank], None if ordered else places.argsort(), alone)


def stream(tokens: Tokens, place: int) -> Stream:
    """The first or the second in the order of attention."""
    assert tokens.streams is not None
    return cast(Stream, tokens.streams[place])


def held_of(tokens: Tokens, place: int) -> int:
    """Tokens of a stream that this rank holds."""
    return stream(tokens, place).alone.held


def cut_stream(tokens: Tokens, x: Tensor, dim: int, place: int) -> Tensor:
    """What this rank holds of a stream, or of entries for its tokens, that all hold whole."""
    return x.index_select(dim, stream(tokens, place).mine.to(x.device))


def join_stream(tokens: Tokens, x: Tensor, dim: int, place: int) -> Tensor:
    """A stream whole on every rank; gradients of all copies add up."""
    one = stream(tokens, place)
    whole = one.alone.spread.unshard(x, dim)
    return whole if one.back is None else whole.index_select(dim, one.back.to(x.device))


def cut_both(tokens: Tokens, x: Tensor, dim: int) -> Tensor:
    """What this rank holds of entries for all tokens, whether of two streams or not."""
    if not tokens.each or tokens.parts is None:
        return tokens.spread.shard(x, dim)
    two = enumerate(x.split(tokens.parts, dim))
    return torch.cat([cut_stream(tokens, part, dim, place) for place, part in two], dim)


def join_both(tokens: Tokens, x: Tensor, dim: int) -> Tensor:
    """The whole on every rank, whether of two streams or not."""
    if not tokens.each or tokens.parts is None:
        return tokens.spread.unshard(x, dim)
    two = enumerate(x.split([held_of(tokens, 0), held_of(tokens, 1)], dim))
    return torch.cat([join_stream(tokens, part, dim, place) for place, part in two], dim)


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
