"""A visit as legal calls of a library's kernel.

Every tile of a visit (``planning.visit``) is one call of a kernel with windows that count from the
bottom right corner, and no row of it is empty. A kernel without windows takes full rectangles and
causal squares, on which both ways to align a causal mask agree; whatever else a tile is, is cut
into these. What a left bound leaves of a square is a causal square once its rows and its keys are
turned round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from usp.backends.library.call import Packed
from usp.planning.visit import Tile, Visit

Kind = tuple[int | None, int | None, bool]
# Of a call: kernels launch a block for each sequence, in a dim of 65535.
_MOST = 1024


@dataclass(frozen=True)
class Rectangle:
    """Rows ``[q0, q1)`` and keys ``[k0, k1)`` of a visit for one kernel.

    Attributes:
        left, right: As in ``call.How``.
        turned: Whether rows and keys go in from the last to the first.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    left: int | None = None
    right: int | None = None
    turned: bool = False

    @property
    def kind(self) -> Kind:
        """What rectangles of one call share."""
        return self.left, self.right, self.turned

    @property
    def size(self) -> tuple[int, int]:
        """Rows and keys."""
        return self.q1 - self.q0, self.k1 - self.k0


@dataclass(frozen=True, eq=False)
class Group:
    """Rectangles of one kind that share neither rows nor keys, in the order of both."""

    rectangles: tuple[Rectangle, ...]

    @property
    def kind(self) -> Kind:
        return self.rectangles[0].kind

    @property
    def turned(self) -> bool:
        return self.rectangles[0].turned

    @cached_property
    def rows(self) -> Places:
        return Places(tuple((r.q0, r.q1) for r in self.rectangles))

    @cached_property
    def keys(self) -> Places:
        return Places(tuple((r.k0, r.k1) for r in self.rectangles))

    @cached_property
    def packed(self) -> dict[tuple[torch.device, int], Packed]:
        """Where its sequences lie in a batch of some size, on devices that have been asked."""
        return {}


@dataclass(frozen=True)
class Places:
    """Runs ``[start, stop)`` of rows or keys that do not overlap, in order."""

    runs: tuple[tuple[int, int], ...]

    @property
    def lengths(self) -> list[int]:
        return [stop - start for start, stop in self.runs]

    @property
    def around(self) -> slice:
        """From the first to the last."""
        return slice(self.runs[0][0], self.runs[-1][1])

    @property
    def adjoin(self) -> bool:
        """Whether nothing lies between them."""
        return all(one[1] == other[0] for one, other in pairwise(self.runs))

    def of(self, x: Tensor, dim: int) -> Tensor:
        """Their part of ``x``, a view where they adjoin."""
        if self.adjoin:
            return x.narrow(dim, self.around.start, sum(self.lengths))
        return torch.cat([x.narrow(dim, a, b - a) for a, b in self.runs], dim)

    def add(self, total: Tensor, more: Tensor, dim: int) -> None:
        """Add their part ``more`` to ``total``."""
        if self.adjoin:
            self.of(total, dim).add_(more)
            return
        for (start, stop), part in zip(self.runs, more.split(self.lengths, dim), strict=True):
            total.narrow(dim, start, stop - start).add_(part)

    def spread(self, part: Tensor, dim: int, empty: float) -> Tensor:
        """Their part in its place ``around`` them, ``empty`` between."""
        if self.adjoin:
            return part
        shape, first = list(part.shape), self.around.start
        shape[dim] = self.around.stop - first
        whole = part.new_full(shape, empty)
        for (start, stop), run in zip(self.runs, part.split(self.lengths, dim), strict=True):
            whole.narrow(dim, start - first, stop - start).copy_(run)
        return whole


# Visits live as long as their plan, which is kept from step to step.
_groups: WeakKeyDictionary[Visit, dict[tuple[bool, bool], tuple[Group, ...]]] = WeakKeyDictionary()


def groups(visit: Visit, *, windows: bool, packed: bool) -> tuple[Group, ...]:
    """The calls that make up a visit.

    Args:
        windows: Whether the kernel takes windows.
        packed: Whether it takes sequences of different lengths at once; else those of a call are of
            one size.
    """
    of_visit = _groups.setdefault(visit, {})
    if (windows, packed) not in of_visit:
        grouped = _grouped(rectangles(visit, windows=windows), packed)
        of_visit[windows, packed] = tuple(Group(tuple(group)) for group in grouped)
    return of_visit[windows, packed]


def rectangles(visit: Visit, *, windows: bool) -> Iterator[Rectangle]:
    """The pairs of a visit, each in one rectangle."""
    for tile in visit.tiles:
        if windows:
            yield _windowed(tile)
        else:
            yield from _without_windows(tile)


def ends(lengths: list[int], batch: int) -> list[int]:
    """Where runs of these lengths begin, for each sample of a batch, and the end of all."""
    return [0, *accumulate(lengths * batch)]


def _grouped(found: Iterable[Rectangle], packed: bool) -> Iterator[list[Rectangle]]:
    """Rectangles of a kind, as long as each lies behind the one before it."""
    open_groups: dict[tuple[Kind, tuple[int, int] | None], list[Rectangle]] = {}
    for each in found:
        key = each.kind, None if packed else each.size
        group = open_groups.setdefault(key, [])
        behind = not group or (group[-1].q1 <= each.q0 and group[-1].k1 <= each.k0)
        if not behind or len(group) == _MOST:
            yield group
            group = open_groups[key] = []
        group.append(each)
    yield from open_groups.values()


def _windowed(tile: Tile) -> Rectangle:
    """A tile with its bounds counted from the bottom right corner."""
    apart = (tile.k1 - tile.k0) - (tile.q1 - tile.q0)
    left = None if tile.lo is None else apart - tile.lo
    right = None if tile.hi is None else tile.hi - apart
    # a negative bound would mean "none" to most, and rows that see nothing to all
    assert (left is None or left >= 0) and (right is None or right >= 0), tile
    return Rectangle(tile.q0, tile.q1, tile.k0, tile.k1, left, right)


def _without_windows(tile: Tile) -> Iterator[Rectangle]:
    rows = tile.q1 - tile.q0
    if tile.lo is None and tile.hi is None:
        yield Rectangle(tile.q0, tile.q1, tile.k0, tile.k1)
    elif tile.lo is None:
        # keys before the diagonal's start are open to every row
        yield from _full(tile.q0, tile.q1, tile.k0, tile.k1 - rows)
        yield _square(tile.q0, tile.k1 - rows, rows)
    elif tile.hi is None:
        yield _square(tile.q0, tile.k0 + tile.lo, rows, turned=True)
        yield from _full(tile.q0, tile.q1, tile.k0 + tile.lo + rows, tile.k1)
    else:
        yield from _band(replace(tile, k0=tile.k0 + tile.lo, lo=0, hi=tile.hi - tile.lo))


def _band(tile: Tile) -> Iterator[Rectangle]:
    """Runs of as many rows as a row has keys: a triangle at each end, all keys between them."""
    assert tile.hi is not None
    width = tile.hi + 1
    for q0 in range(tile.q0, tile.q1, width):
        q1 = min(q0 + width, tile.q1)
        rows, k0 = q1 - q0, tile.k0 + q0 - tile.q0
        yield _square(q0, k0, rows, turned=True)
        yield from _full(q0, q1, k0 + rows, k0 + width)
        if rows > 1:
            yield _square(q0 + 1, k0 + width, rows - 1)


def _full(q0: int, q1: int, k0: int, k1: int) -> Iterator[Rectangle]:
    if k0 < k1:
        yield Rectangle(q0, q1, k0, k1)


def _square(q0: int, k0: int, rows: int, *, turned: bool = False) -> Rectangle:
    """Row i sees keys up to i; turned round, those from i on."""
    if rows == 1:  # some kernels drop the mask of a single row, others align it their own way
        return Rectangle(q0, q0 + 1, k0, k0 + 1)
    return Rectangle(q0, q0 + rows, k0, k0 + rows, None, 0, turned)
