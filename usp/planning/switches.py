"""Which of several dims the ranks of a mesh share next, and what each sends for it: pure data."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from usp.planning.shares import shares

Degrees = tuple[int, int]


def elements_sent(
    shape: Sequence[int], src_dim: int, dst_dim: int, degrees: Degrees
) -> tuple[int, ...]:
    """Elements that leave each rank of a mesh when another dim comes to be shared.

    A rank holds t of the T items along ``src_dim`` and is to hold s of the S along ``dst_dim``:
    it keeps t s of its t S, and sends ``t (S - s)`` times what lies at each.

    Args:
        shape: Of the whole tensor.
        degrees: Of the ring and of Ulysses.
    """
    if src_dim == dst_dim:
        return (0,) * prod(degrees)
    items = prod([length for dim, length in enumerate(shape) if dim not in (src_dim, dst_dim)])
    of_src, of_dst = (shares("contiguous", shape[dim], *degrees) for dim in (src_dim, dst_dim))
    return tuple(items * t * (shape[dst_dim] - s) for t, s in zip(of_src, of_dst, strict=True))


def least_sent(
    shape: Sequence[int], src_dim: int, candidates: Sequence[int], degrees: Degrees
) -> int:
    """The dim to share next: where the rank that sends most sends least, then all together.

    So a dim that has an item for each rank comes before one that has not. The first of equals.

    Args:
        candidates: At least one.
        shape: As in ``elements_sent``. Dims that are neither shared nor candidates may be left out.
        src_dim, degrees: See ``elements_sent``.
    """
    if len(candidates) == 1:
        return candidates[0]
    shape = [int(length) for length in shape]  # of symbols a graph's own constants

    def cost(dim: int) -> tuple[int, int]:
        sent = elements_sent(shape, src_dim, dim, degrees)
        return max(sent), sum(sent)

    best, *others = candidates
    for other in others:  # torch.compile knows no min with a key
        if cost(other) < cost(best):
            best = other
    return best
