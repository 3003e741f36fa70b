"""Who sees whom: a mask gives each query position one interval of key positions.

Causal, sliding window, packed documents and prefix-LM are all intervals
``[first(p), stop(p))`` whose ends do not decrease in ``p``; so is every combination of them,
the intersection. What is not an interval is an additive bias and does not live here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from usp.planning.kinds import flag, integer


class Term(Protocol):
    """One condition of a mask."""

    def interval(self, positions: Tensor, first: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        """Narrow ``[first, stop)`` at each of ``positions`` to what this condition allows."""


@dataclass(frozen=True)
class Causal:
    """Keys up to the query's own position, and the first ``prefix_len`` keys for everyone."""

    prefix_len: int = 0

    def interval(self, positions: Tensor, first: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        return first, torch.minimum(stop, (positions + 1).clamp_min(self.prefix_len))


@dataclass(frozen=True)
class Window:
    """``left`` keys before and ``right`` keys after the query's own position; None is no bound."""

    left: int | None = None
    right: int | None = None

    def interval(self, positions: Tensor, first: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        if self.left is not None:
            first = torch.maximum(first, positions - self.left)
        if self.right is not None:
            stop = torch.minimum(stop, positions + (self.right + 1))
        return first, stop


@dataclass(frozen=True)
class Documents:
    """Only keys of the query's own document; ``cu_seqlens`` are the documents' boundaries."""

    cu_seqlens: tuple[int, ...]

    def interval(self, positions: Tensor, first: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        bounds = torch.tensor(self.cu_seqlens, device=positions.device)
        document = torch.searchsorted(bounds, positions, right=True) - 1
        return torch.maximum(first, bounds[document]), torch.minimum(stop, bounds[document + 1])


@dataclass(frozen=True)
class Mask:
    """The intersection of its terms; no term means that everyone sees everyone."""

    terms: tuple[Term, ...] = ()

    def __and__(self, other: Mask) -> Mask:
        return Mask(self.terms + other.terms)

    def intervals(self, positions: Tensor, key_len: int) -> tuple[Tensor, Tensor]:
        """Visible key positions of each query position.

        Args:
            positions: (n,) int64 on CPU, ascending global positions of queries.
            key_len: Number of keys in the whole sequence.

        Returns:
            first, stop: (n,) int64, non-decreasing, ``0 <= first <= stop <= key_len``;
            equal where a query sees nothing.
        """
        first = torch.zeros_like(positions)
        stop = torch.full_like(positions, key_len)
        for term in self.terms:
            first, stop = term.interval(positions, first, stop)
        first = first.clamp(0, key_len)
        # An empty intersection keeps both ends monotone: max of two non-decreasing ends.
        return first, torch.maximum(first, stop.clamp(0, key_len))


def make_mask(
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    cu_seqlens: Sequence[int] | Tensor | None = None,
    prefix_len: int | None = None,
) -> Mask:
    """The mask that the public options describe.

    Args:
        causal: Hide keys after the query's own global position.
        window_size: (left, right) keys visible beside the query's own position, None is no bound.
        cu_seqlens: Global boundaries of packed documents, ``(0, ..., total)``, host integers.
        prefix_len: First keys that ``causal`` opens to every query; a window still closes them.

    Raises:
        ValueError: a bound is negative, or boundaries decrease or do not start at 0.
    """
    terms: list[Term] = []
    causal = flag("causal", causal)
    if prefix_len is not None:
        prefix_len = integer("prefix_len", prefix_len, least=0)
        if not causal:
            raise ValueError(
                f"prefix_len={prefix_len} opens keys that causal hides, but causal is False: "
                "pass causal=True or leave prefix_len out"
            )
    if causal:
        terms.append(Causal(prefix_len or 0))
    window = check_window(window_size)
    if window != Window():
        terms.append(window)
    if cu_seqlens is not None:
        terms.append(Documents(check_cu_seqlens(cu_seqlens)))
    return Mask(tuple(terms))


def check_window(window_size: Sequence[int | None]) -> Window:
    """The window of a pair (left, right).

    Raises:
        TypeError: a bound is no integer.
        ValueError: it is no pair, or a bound is below 0; names it.
    """
    if not isinstance(window_size, Sequence) or len(window_size) != 2:
        raise ValueError(f"window_size must be a pair (left, right), got {window_size!r}")
    sizes = [
        None if size is None else integer("window_size (None for no bound)", size)
        for size in window_size
    ]
    for side, size in zip(("left", "right"), sizes, strict=True):
        if size is not None and size < 0:
            raise ValueError(
                f"window_size counts keys and must be 0 or more (None for no bound), "
                f"got {side}={size}"
            )
    return Window(*sizes)


def check_cu_seqlens(cu_seqlens: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Document boundaries as a tuple: ``(0, ..., total)``, non-decreasing.

    Raises:
        ValueError: fewer than two boundaries, a first one that is not 0, or a decreasing pair;
            names the values.
    """
    if isinstance(cu_seqlens, Tensor):
        cu_seqlens = host_boundaries(cu_seqlens).tolist()
    elif not isinstance(cu_seqlens, Iterable):
        raise TypeError(f"cu_seqlens must be host integers (0, ..., total), got {cu_seqlens!r}")
    bounds = tuple(integer("a boundary of cu_seqlens", bound) for bound in cu_seqlens)
    if len(bounds) < 2 or bounds[0] != 0:
        raise ValueError(
            f"cu_seqlens must be (0, ..., total) with at least two boundaries, got {len(bounds)} "
            f"starting with {bounds[:1]}"
        )
    for i, (a, b) in enumerate(pairwise(bounds)):
        if b < a:
            raise ValueError(f"cu_seqlens must not decrease, but [{i}]={a} and [{i + 1}]={b}")
    return bounds


def host_boundaries(cu_seqlens: Tensor) -> Tensor:
    """``cu_seqlens`` itself, whatever its values are.

    Raises:
        ValueError: it is no list of numbers on the host.
    """
    if cu_seqlens.device.type != "cpu":
        raise ValueError(
            f"cu_seqlens must be host integers (a tuple or a CPU tensor), got a tensor on "
            f"{cu_seqlens.device}: planning must not wait for the device"
        )
    if cu_seqlens.dim() != 1:
        raise ValueError(f"cu_seqlens must have one dim, got shape {tuple(cu_seqlens.shape)}")
    return cu_seqlens
