"""Neighbourhoods on a grid of tokens in 1, 2 or 3 dims: windows in each dim, row-major."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor

from usp.planning.kinds import flag, integer
from usp.planning.masks.bands import Bands, nothing, without_empty
from usp.planning.masks.mask import Mask
from usp.planning.memory import uninitialised

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
        place, residue = x // self.dilation, x % self.dilation
        count = (self.size - residue + (self.dilation - 1)) // self.dilation
        first = place - (self.kernel - 1 if self.causal else self.kernel // 2)
        if self.shifts and not self.causal:
            first = torch.minimum(first.clamp_min(0), (count - self.kernel).clamp_min(0))
        stop = place + 1 if self.causal else first + self.kernel
        return first.clamp_min(0), torch.minimum(stop, count)

    def sees(self, x: Tensor, offset: int) -> Tensor:
        """Whether a coordinate sees the key so many steps away."""
        first, stop = self.interval(x)
        place = x // self.dilation + offset
        return (first <= place) & (place < stop)


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
        width, total = self.grid[-1], prod(self.grid)
        if not len(positions) or not total:
            return nothing(positions)
        inside = positions - self.start
        line = torch.div(inside, width, rounding_mode="floor")
        ends = int(line[0]), int(line[-1]) + 1
        lines = torch.arange(*ends, dtype=line.dtype, device=line.device)
        x, *_, line = inside - line * width, line - lines[0]
        offsets, seen = self._lines(lines)
        if not len(offsets):
            return nothing(positions)
        base = ((lines + offsets[:, None]) * width).clamp_(0, total)
        return without_empty(Bands(*self._inside_lines(base, seen, x, line)), trim)

    def _lines(self, lines: Tensor) -> tuple[Tensor, Tensor]:
        """Lines of keys that are seen whole or in part, by their distance from the query's own.

        Returns:
            (d,) ascending distances in lines, and (d, lines) bool where they are seen.
        """
        windows, rest = self.windows[:-1], lines
        coordinates: list[Tensor] = []
        for size in reversed(self.grid[:-1]):
            coordinates.insert(0, rest % size)
            rest = rest // size
        there = (lines >= 0) & (lines < prod(self.grid[:-1]))
        seen: dict[int, Tensor] = {}
        each = [
            {a: w.sees(c, a) for a in w.offsets} for w, c in zip(windows, coordinates, strict=True)
        ]
        for steps in product(*(w.offsets for w in windows)):
            distance, valid = 0, there
            for window, by_step, a in zip(windows, each, steps, strict=True):
                distance = distance * window.size + a * window.dilation
                valid = valid & by_step[a]
            seen[distance] = seen[distance] | valid if distance in seen else valid
        used = sorted(distance for distance, valid in seen.items() if valid.any())
        if not used:
            return lines.new_empty(0), lines.new_empty((0, len(lines)), dtype=torch.bool)
        return lines.new_tensor(used), torch.stack([seen[distance] for distance in used])

    def _inside_lines(
        self, base: Tensor, seen: Tensor, x: Tensor, line: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both ends of each band. What is not seen is empty where its line begins.

        Args:
            base, seen: (d, lines) where the lines of keys begin, and whether they are seen.
            x, line: (n,) of each query.
        """
        window = self.windows[-1]
        if window.dilation == 1:
            parts = [window.interval(x)]
        else:  # neighbours along the line are apart: a band for each
            at = ((x + a * window.dilation).clamp_(0, window.size) for a in window.offsets)
            parts = [(p, p + window.sees(x, a)) for p, a in zip(at, window.offsets, strict=True)]
        ends = uninitialised(2, len(base) * len(parts), len(x), dtype=x.dtype)
        bands = iter(ends.unbind(1))
        for begin, used in zip(base + self.start, seen, strict=True):
            here = begin.index_select(0, line)
            valid = 1 if used.all() else used.to(x.dtype).index_select(0, line)
            for part in parts:
                for end, inside in zip(next(bands), part, strict=True):
                    torch.add(here, inside * valid, out=end)
        return ends[0], ends[1]

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
