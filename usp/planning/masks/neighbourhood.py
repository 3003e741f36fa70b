"""Neighbourhoods on a grid of tokens in 1, 2 or 3 dims: windows in each dim, row-major."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from usp.planning.kinds import flag, integer
from usp.planning.masks.bands import Bands, nothing, without_empty
from usp.planning.masks.mask import Band, EachBand, Mask
from usp.planning.memory import uninitialised
from usp.planning.walk import divided

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

    def interval(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys ``[first, stop)``, counted among those of the coordinate's residue; ``out`` is
        (2, n) room for them."""
        first, stop = x.new_empty((2, len(x))) if out is None else out
        place, count = x, x.new_tensor(self.size)
        if self.dilation > 1:
            place = x // self.dilation
            count = (self.size - x % self.dilation + (self.dilation - 1)) // self.dilation
        torch.sub(place, self.kernel - 1 if self.causal else self.kernel // 2, out=first)
        if self.shifts and not self.causal:
            last = (count - self.kernel).clamp_min_(0)
            torch.minimum(first.clamp_min_(0), last, out=first)
        if self.causal:
            torch.add(place, 1, out=stop)
        else:
            torch.add(first, self.kernel, out=stop)
        return first.clamp_min_(0), torch.minimum(stop, count, out=stop)

    def sees(self, x: Tensor) -> dict[int, Tensor]:
        """Whether a coordinate sees the key so many steps away, of each offset."""
        first, stop = self.interval(x)
        place = x if self.dilation == 1 else x // self.dilation
        offsets = torch.tensor(self.offsets, dtype=x.dtype, device=x.device)[:, None]
        seen = (first - place <= offsets) & (stop - place > offsets)
        return dict(zip(self.offsets, seen, strict=True))


class _Placed(NamedTuple):
    """Where queries are on the grid.

    Attributes:
        line, begin: (n,) the line of each, counted from that of the first, and where it begins.
        parts: Keys that each would see of its own line, (2, n) first and stop, ascending.
        distances: Of the lines of keys that are seen, in lines, ascending.
        seen: Of each distance, (lines,) bool which lines of queries see something.
    """

    line: Tensor
    begin: Tensor
    parts: list[Tensor]
    distances: list[int]
    seen: list[Tensor]


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
        if not len(positions) or not prod(self.grid):
            return nothing(positions)
        placed = self._placed(positions)
        most = len(placed.distances) * len(placed.parts)
        ends = uninitialised(2, most, len(positions), dtype=positions.dtype)
        for into, band in zip(ends.unbind(1), self._inside_lines(placed), strict=True):
            into.copy_(band)
        return without_empty(Bands(*ends), trim)

    def each_band(self, positions: Tensor, key_len: int) -> EachBand:
        if not len(positions) or not prod(self.grid):
            return 0, []
        placed = self._placed(positions)
        parts, each = placed.parts, [_run_of(seen) for seen in placed.seen]
        lines = [run for run in each if run is not None]
        # further ahead fewer lines at the end see keys, and more at the beginning: those that see
        # none lie before all others or behind them; but whole lines may become one band
        is_whole = self.grid[-1] <= self.kernel[-1]
        back = any(a < b for two in pairwise(lines) for a, b in zip(*two, strict=True))
        if is_whole or back or len(lines) < len(each):
            every, ends = range(len(positions)), self._inside_lines(placed)
            return len(each) * len(parts), (Band(end, 0, every) for end in ends)
        bounds = torch.tensor(lines, dtype=positions.dtype, device=positions.device)
        rows = torch.searchsorted(placed.line, bounds).tolist()
        width, found = self.grid[-1], zip(placed.distances, rows, strict=True)
        return len(each) * len(parts), [
            Band(part, distance * width, range(*some)) for distance, some in found for part in parts
        ]

    def _placed(self, positions: Tensor) -> _Placed:
        """Where queries are, one at least."""
        width = self.grid[-1]
        # all at once: fresh memory takes longer than what is written there
        room = uninitialised(5, len(positions), dtype=positions.dtype)
        x, line, begin = torch.sub(positions, self.start, out=room[0]), room[1], room[2]
        torch.mul(divided(line.copy_(x), width), width, out=begin)
        first_line, x = int(line[0]), x.sub_(begin)
        lines = torch.arange(first_line, int(line[-1]) + 1, dtype=line.dtype, device=line.device)
        parts = self._parts(x, room[3:])
        for part in parts:
            for end in part:
                end.add_(begin).add_(self.start)
        return _Placed(line.sub_(first_line), begin, parts, *self._lines(lines))

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

    def _parts(self, x: Tensor, room: Tensor) -> list[Tensor]:
        """Of each query the keys that it sees of a line, counted in the line: (2, n) each, the
        first one in the ``room`` for it."""
        window = self.windows[-1]
        if window.dilation == 1:
            window.interval(x, room)
            return [room]
        # neighbours along the line are apart: a band for each
        at = ((x + a * window.dilation).clamp_(0, window.size) for a in window.offsets)
        each = zip(at, window.sees(x).values(), strict=True)
        return [torch.stack((place, place + is_seen)) for place, is_seen in each]

    def _inside_lines(self, placed: _Placed) -> Iterator[Tensor]:
        """Both ends of each band. What is not seen is empty where its line begins."""
        line, begin, parts, *each = placed
        total, ends = prod(self.grid), torch.empty_like(parts[0])

        def empty(rows: slice, ahead: int) -> Tensor:
            return (begin[rows] + ahead).clamp_(0, total).add_(self.start)

        for distance, seen in zip(*each, strict=True):
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


def _run_of(seen: Tensor) -> tuple[int, int] | None:
    """First and stop of what is true, once at least; None for more than one run."""
    places = seen.nonzero()
    first, stop = int(places[0]), int(places[-1]) + 1
    return (first, stop) if len(places) == stop - first else None


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
