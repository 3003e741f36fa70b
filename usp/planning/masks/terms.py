"""The masks that models use, one interval of keys for each query; unions of them are the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from usp.planning.kinds import integer
from usp.planning.masks import bands
from usp.planning.masks.bands import Bands
from usp.planning.masks.bounds import check_cu_seqlens
from usp.planning.masks.mask import Everything, Mask, Nothing
from usp.planning.walk import parts_of


@dataclass(frozen=True)
class Interval(Mask):
    """One interval around each query's own position; made by ``causal`` and ``window``.

    Attributes:
        left, right: Keys before and after it; None is no bound, below 0 they do not reach it.
    """

    left: int | None
    right: int | None

    def bands(self, positions: Tensor, key_len: int, trim: bool = True) -> Bands:
        first = torch.zeros_like(positions) if self.left is None else positions - self.left
        if self.right is None:
            return bands.clipped(first, torch.full_like(positions, key_len), key_len)
        return bands.clipped(first, positions + (self.right + 1), key_len)

    def __repr__(self) -> str:
        if self.left is None and self.right is not None:
            return f"causal({self.right or ''})"
        return f"window({self.left}, {self.right})"


@dataclass(frozen=True)
class Documents(Mask):
    """Keys of the query's own document; made by ``documents``."""

    cu_seqlens: tuple[int, ...]

    def bands(self, positions: Tensor, key_len: int, trim: bool = True) -> Bands:
        return bands.clipped(*_own_part(self.cu_seqlens, positions), key_len)

    def refuse_lengths(self, query_len: int, key_len: int) -> None:
        total = self.cu_seqlens[-1]
        if (query_len, key_len) != (total, total):
            raise ValueError(
                f"cu_seqlens ends at {total}, but there are {query_len} queries and {key_len} "
                "keys in the whole sequence"
            )

    def __repr__(self) -> str:
        return f"documents({self.cu_seqlens})"


@dataclass(frozen=True)
class Blocks(Mask):
    """Keys up to the end of the query's own block; made by ``blocks``."""

    bounds: tuple[int, ...]

    def bands(self, positions: Tensor, key_len: int, trim: bool = True) -> Bands:
        _, stop = _own_part(self.bounds, positions)
        return bands.clipped(torch.zeros_like(positions), stop, key_len)

    def refuse_lengths(self, query_len: int, key_len: int) -> None:
        if query_len > self.bounds[-1]:
            raise ValueError(
                f"the bounds of blocks end at {self.bounds[-1]}, but there are queries up to "
                f"position {query_len}"
            )

    def __repr__(self) -> str:
        return f"blocks({self.bounds})"


def _own_part(bounds: tuple[int, ...], positions: Tensor) -> tuple[Tensor, Tensor]:
    """Where the part of each position begins and ends; empty, and monotone, outside all parts."""
    ends = positions.new_tensor((0, *bounds, bounds[-1]))
    part = parts_of(ends[1:-1].contiguous(), positions)
    return ends.index_select(0, part), ends[1:].index_select(0, part)


@dataclass(frozen=True)
class FirstKeys(Mask):
    """The first keys; made by ``first_keys``."""

    count: int

    def bands(self, positions: Tensor, key_len: int, trim: bool = True) -> Bands:
        first = torch.zeros_like(positions)
        return bands.clipped(first, first + self.count, key_len)

    def __repr__(self) -> str:
        return f"first_keys({self.count})"


@dataclass(frozen=True)
class FirstQueries(Mask):
    """All keys for the first queries, none for the others; made by ``first_queries``."""

    count: int

    def bands(self, positions: Tensor, key_len: int, trim: bool = True) -> Bands:
        # the others see nothing behind all keys, where that is monotone
        stop = torch.full_like(positions, key_len)
        return bands.clipped(stop.masked_fill(positions < self.count, 0), stop, key_len)

    def __repr__(self) -> str:
        return f"first_queries({self.count})"


def everything() -> Mask:
    """Every query sees every key."""
    return Everything()


def nothing() -> Mask:
    """No query sees any key."""
    return Nothing()


def causal(offset: int = 0) -> Mask:
    """Keys up to the query's own position, and ``offset`` more.

    Args:
        offset: Position of the first query among the keys. With fewer queries than keys, keys
            minus queries aligns both ends (flash-attn's meaning), 0 both beginnings.
    """
    return Interval(None, integer("offset", offset))


def window(left: int | None = None, right: int | None = None) -> Mask:
    """Keys beside the query's own position.

    Args:
        left, right: How many before and after it, 0 or more; None is no bound.

    Raises:
        TypeError: a bound is no integer.
        ValueError: a bound is below 0.
    """
    sizes = [None if size is None else integer("window", size) for size in (left, right)]
    for side, size in zip(("left", "right"), sizes, strict=True):
        if size is not None and size < 0:
            raise ValueError(
                f"a window counts keys and must be 0 or more (None for no bound), got {side}={size}"
            )
    return Everything() if sizes == [None, None] else Interval(*sizes)


def documents(cu_seqlens: Sequence[int] | Tensor) -> Mask:
    """Keys of the query's own document.

    Args:
        cu_seqlens: Boundaries ``(0, ..., total)``, host integers; documents may be empty.

    Raises:
        ValueError: they do not start at 0, or decrease.
    """
    return Documents(check_cu_seqlens(cu_seqlens))


def first_keys(count: int) -> Mask:
    """The first ``count`` keys, for every query: sink tokens, registers, a class token."""
    return FirstKeys(integer("count", count, least=0))


def first_queries(count: int) -> Mask:
    """All keys for the first ``count`` queries, none for the others: tokens that see all."""
    return FirstQueries(integer("count", count, least=0))


def blocks(bounds: Sequence[int] | Tensor) -> Mask:
    """Keys of the query's own block and of those before it: frames of a video, chunked prefill.

    Args:
        bounds: Boundaries of the blocks, ``(0, ..., total)``.
    """
    return Blocks(check_cu_seqlens(bounds, "bounds"))


def shared_prefix(cu_seqlens: Sequence[int] | Tensor) -> Mask:
    """Several answers to one question: each part sees itself and the first one.

    Args:
        cu_seqlens: Boundaries ``(0, question, ..., total)`` of the question and of its answers.
            ``& causal()`` for language models.
    """
    bounds = check_cu_seqlens(cu_seqlens)
    return documents(bounds) | first_keys(bounds[1])
