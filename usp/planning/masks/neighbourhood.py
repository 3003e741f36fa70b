"""Neighbourhoods on a grid of tokens in 1, 2 or 3 dims: windows in each dim, row-major."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor

from usp.planning.kinds import flag, integer
from usp.planning.masks.bands import Bands, without_empty
from usp.planning.masks.mask import EachBand, Mask

EDGES = ("clip", "shift")


@dataclass(frozen=True)
class Window:
    """The keys of one dim of the grid that a coordinate sees.

    Attributes:
        size, kernel, dilation, causal: Of the dim.
        shifts: Whether a window at an edge is moved inwards whole, and not cut.
    """

    size: int
    kernel: int
    dilation: int
    causal: bool
    shifts: bool

    @property
    def offsets(self) -> range:
        """From the query to keys that it may see, in steps of the dilation."""
        if self.causal:
            return range(1 - self.kernel, 1)
        if self.shifts:
            return range(1 - self.kernel, self.kernel)
        return range(-(self.kernel // 2), (self.kernel + 1) // 2)

    def interval(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``[first, stop)``, counted among those of the coordinate's residue."""
        place, count = x, x.new_tensor(self.size)
        if self.dilation > 1:
            place = x // self.dilation
            count = (self.size - x % self.dilation + (self.dilation - 1)) // self.dilation
        first = place - (self.kernel - 1 if self.causal else self.kernel // 2)
        if self.shifts and not self.causal:
            last = (count - self.kernel).clamp_min_(0)
            first = torch.minimum(first.clamp_min_(0), last, out=first)
        stop = place + 1 if self.causal else first + self.kernel
        return first.clamp_min_(0), torch.minimum(stop, count, out=stop)

    def sees(self, x: Tensor) -> dict[int, Tensor]:
        """Whether a coordinate sees the key so many steps away, of each offset."""
        first, stop = self.interval(x)
        place = x if self.dilation == 1 else x // self.dilation
        before, behind = first - place, stop - place
        return {a: (before <= a) & (behind > a) for a in self.offsets}


@dataclass(frozen=True)
class Neighbourhood(Mask):
    """Windows in each dim of a grid; made by ``neighbourhood``."""

    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    causal: tuple[bool, ...]
    dilation: tuple[int, ...]
    edges: str
    start: int

    @property
    def stop(self) -> int:
        return self.start + prod(self.grid)

    @property
    def windows(self) -> list[Window]:
        dims = zip(self.grid, self.kernel, self.dilation, self.causal, strict=True)
        return [Window(*dim, self.edges == "shift") for dim in dims]

    @property
    def seams(self) -> frozenset[tuple[int, int]]:
        return frozenset({(self.start, self.grid[-1])} if len(self.grid) > 1 else ())

    def bands(self, positions: Tensor, key_len: int, trim: bool = True) -> Bands:
        most, each = self.each_band(positions, key_len)
        ends = positions.new_empty((2, most, len(positions)))
        for into, band in zip(ends.unbind(1), each, strict=True):
            into.copy_(band)
        return without_empty(Bands(*ends), trim)

    def each_band(self, positions: Tensor, key_len: int) -> EachBand:
        width, total = self.grid[-1], prod(self.grid)
        if not len(positions) or not total:
            return 0, iter(())
        x = positions - self.start
        line = torch.div(x, width, rounding_mode="floor")
        begin, first_line = line * width, int(line[0])
        lines = torch.arange(first_line, int(line[-1]) + 1, dtype=line.dtype, device=line.device)
        parts = self._parts(x.sub_(begin))
        distances, seen = self._lines(lines)
        placed = line.sub_(first_line), begin
        each = self._inside_lines(zip(distances, seen, strict=True), placed, parts)
        return len(distances) * len(parts), each

    def _lines(self, lines: Tensor) -> tuple[list[int], list[Tensor]]:
        """Lines of keys that are seen whole or in part, by their distance from the query's own.

        Returns:
            Ascending distances in lines, and of each (lines,) bool where it is seen.
        """
        windows, rest = self.windows[:-1], lines
        coordinates: list[Tensor] = []
        for size in reversed(self.grid[:-1]):
            coordinates.insert(0, rest % size)
            rest = rest // size
        there = (lines >= 0) & (lines < prod(self.grid[:-1]))
        seen: dict[int, Tensor] = {}
        each = [w.sees(c) for w, c in zip(windows, coordinates, strict=True)]
        for steps in product(*(w.offsets for w in windows)):
            distance, valid = 0, there
            for window, by_step, a in zip(windows, each, steps, strict=True):
                distance = distance * window.size + a * window.dilation
                valid = valid & by_step[a]
            seen[distance] = seen[distance] | valid if distance in seen else valid
        used = sorted(distance for distance, valid in seen.items() if valid.any())
        return used, [seen[distance] for distance in used]

    def _parts(self, x: Tensor) -> list[Tensor]:
        """Of each query the keys that it sees of a line, counted in the line: (2, n) each."""
        window = self.windows[-1]
        if window.dilation == 1:
            return [torch.stack(window.interval(x))]
        # neighbours along the line are apart: a band for each
        at = ((x + a * window.dilation).clamp_(0, window.size) for a in window.offsets)
        each = zip(at, window.sees(x).values(), strict=True)
        return [torch.stack((place, place + is_seen)) for place, is_seen in each]

    def _inside_lines(
        self,
        distances: Iterable[tuple[int, Tensor]],
        placed: tuple[Tensor, Tensor],
        parts: list[Tensor],
    ) -> Iterator[Tensor]:
        """Both ends of each band. What is not seen is empty where its line begins.

        Args:
            distances: Of lines of keys, and (lines,) whether these are seen.
            placed: (n,) the line of each query among these, and where it begins in the grid.
            parts: As of ``_parts``.
        """
        (line, begin), total = placed, prod(self.grid)
        for part in parts:
            part += begin + self.start if self.start else begin
        ends = begin.new_empty((2, len(begin)))

        def empty(rows: slice, ahead: int) -> Tensor:
            return (begin[rows] + ahead).clamp_(0, total).add_(self.start)

        for distance, seen in distances:
            ahead, used = distance * self.grid[-1], seen.nonzero()
            lines = int(used[0]), int(used[-1]) + 1
            start = int(torch.searchsorted(line, lines[0])) if lines[0] else 0
            end = int(torch.searchsorted(line, lines[1])) if lines[1] < len(seen) else len(line)
            rows, outside = slice(start, end), [slice(0, start), slice(end, len(line))]
            valid = None
            if len(used) < lines[1] - lines[0]:
                valid = seen.to(line.dtype).index_select(0, line[rows])
            for part in parts:
                torch.add(part[:, rows], ahead, out=ends[:, rows])
                if valid is not None:
                    inside = ends[:, rows] - (begin[rows] + (ahead + self.start))
                    ends[:, rows] = empty(rows, ahead) + inside * valid
                for some in outside:
                    if some.start < some.stop:
                        ends[:, some] = empty(some, ahead)
                yield ends

    def refuse_lengths(self, query_len: int, key_len: int) -> None:
        if query_len < self.stop or key_len < self.stop:
            raise ValueError(
                f"the grid {self.grid} of a neighbourhood holds positions {self.start} to "
                f"{self.stop}, but there are {query_len} queries and {key_len} keys"
            )

    def __repr__(self) -> str:
        return (
            f"neighbourhood({self.grid}, {self.kernel}, causal={self.causal}, "
            f"dilation={self.dilation}, edges={self.edges!r}, start={self.start})"
        )


def neighbourhood(
    grid: int | Sequence[int],
    kernel: int | Sequence[int],
    *,
    causal: bool | Sequence[bool] = False,
    dilation: int | Sequence[int] = 1,
    edges: str = "clip",
    start: int = 0,
) -> Mask:
    """A window in each dim around the query's own place on a grid, tokens in row-major order.

    Args:
        grid: Tokens along each of 1, 2 or 3 dims.
        kernel: Width of the window, one for all dims or one each. An even one has one more key
            before the query than behind it.
        causal: Whether the window ends at the query: ``kernel`` keys up to its own. For all dims
            or each.
        dilation: Distance of the window's keys, for all dims or each.
        edges: "clip": what lies outside the grid is missing. "shift": at an edge the window is
            moved inwards, so that every query sees as many keys (NATTEN).
        start: Position of the grid's first token, behind a class token or registers. Tokens
            outside the grid see nothing of it; ``| first_keys(n) | first_queries(n)`` opens them.

    Raises:
        TypeError, ValueError: sizes that are no integers, below 1, or of another number of dims.

    Source:
        Neighborhood attention arXiv:2204.07143, dilated arXiv:2209.15001.
    """
    sizes = _each("grid", grid, None, least=0)
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"a grid has 1, 2 or 3 dims, got {sizes}")
    if edges not in EDGES:
        raise ValueError(f"edges must be one of {', '.join(EDGES)}, got {edges!r}")
    dims = len(sizes)
    flags = [causal] * dims if isinstance(causal, bool) else list(causal)
    if len(flags) != dims:
        raise ValueError(f"causal must be one flag or {dims}, got {causal}")
    return Neighbourhood(
        sizes,
        _each("kernel", kernel, dims, least=1),
        tuple(flag("causal", each) for each in flags),
        _each("dilation", dilation, dims, least=1),
        edges,
        integer("start", start, least=0),
    )


def _each(
    name: str, sizes: int | Sequence[int], dims: int | None, *, least: int
) -> tuple[int, ...]:
    """One size for each dim."""
    if isinstance(sizes, (tuple, list)):
        found = tuple(integer(name, size, least=least) for size in sizes)
    else:
        found = (integer(name, sizes, least=least),) * (dims or 1)
    if dims is not None and len(found) != dims:
        raise ValueError(f"{name} must be one number or {dims}, one for each dim, got {found}")
    return found
