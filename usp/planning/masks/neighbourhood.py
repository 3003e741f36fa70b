"""Neighbourhoods on a grid of tokens in 1, 2 or 3 dims: windows in each dim, row-major."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from usp.planning.kinds import flag, integer
from usp.planning.masks.bands import Bands, nothing, without_empty
from usp.planning.masks.mask import Band, EachBand, Mask
from usp.planning.masks.window import Lines, Window, lines_of
from usp.planning.memory import uninitialised
from usp.planning.walk import divided

EDGES = ("clip", "shift")


class _Placed(NamedTuple):
    """Where queries are on the grid.

    Attributes:
        first_line: That of the first query.
        begin: (n,) where the line of each begins.
        parts: Keys that each would see of its own line, (2, n) first and stop, ascending.
        lines: Those of keys that are seen, by ascending distance.
    """

    first_line: int
    begin: Tensor
    parts: list[Tensor]
    lines: list[Lines]


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
        most = len(placed.lines) * len(placed.parts)
        ends = uninitialised(2, most, len(positions), dtype=positions.dtype)
        for _ in self._inside_lines(placed, ends.unbind(1)):
            pass
        return without_empty(Bands(*ends), trim)

    def each_band(self, positions: Tensor, key_len: int) -> EachBand:
        if not len(positions) or not prod(self.grid):
            return 0, []
        placed = self._placed(positions)
        first_line, _, parts, lines = placed
        most, width = len(lines) * len(parts), self.grid[-1]
        # further ahead fewer lines at the end see keys, and more at the beginning: those that see
        # none lie before all others or behind them; but whole lines may become one band
        is_whole = width <= self.kernel[-1]
        back = any(a.first < b.first or a.stop < b.stop for a, b in pairwise(lines))
        if is_whole or back or any(each.seen is not None for each in lines):
            every, room = range(len(positions)), torch.empty_like(parts[0])
            ends = self._inside_lines(placed, repeat(room))
            return most, (Band(end, 0, every) for end in ends)
        rows = self._rows_of(positions, first_line, [each[1:3] for each in lines])
        return most, [
            Band(part, each.distance * width, some, width)
            for each, some in zip(lines, rows, strict=True)
            for part in parts
        ]

    def _rows_of(
        self, positions: Tensor, first_line: int, lines: list[tuple[int, int]]
    ) -> list[range]:
        """Which queries lie in lines from one on up to another, counted from the first one's."""
        ends = torch.tensor(lines, dtype=positions.dtype, device=positions.device)
        ends = (ends + first_line) * self.grid[-1] + self.start
        return [range(*some) for some in torch.searchsorted(positions, ends).tolist()]

    def _placed(self, positions: Tensor) -> _Placed:
        """Where queries are, one at least."""
        width = self.grid[-1]
        # all at once: fresh memory takes longer than what is written there
        room = uninitialised(3, len(positions), dtype=positions.dtype)
        begin, x = room[0], torch.sub(positions, self.start, out=room[2])
        first_line, last_line = (int(x[i]) // width for i in (0, -1))
        divided(begin.copy_(x), width).mul_(width)
        parts = self._parts(x.sub_(begin), room[1:])
        for part in parts:
            part.add_(begin)
            if self.start:
                part.add_(self.start)
        return _Placed(
            first_line, begin, parts, lines_of(tuple(self.windows[:-1]), first_line, last_line)
        )

    def _parts(self, x: Tensor, room: Tensor) -> list[Tensor]:
        """Of each query the keys that it sees of a line, counted in the line: (2, n) each, the
        first one in the ``room`` for it."""
        window = self.windows[-1]
        if window.dilation == 1:
            window.interval(x, room)
            return [room]
        # neighbours along the line are apart: a band for each
        at = ((x + a * window.dilation).clamp_(0, window.size) for a in window.offsets)
        each = zip(at, window.sees(x), strict=True)
        return [torch.stack((place, place + is_seen)) for place, is_seen in each]

    def _inside_lines(self, placed: _Placed, rooms: Iterable[Tensor]) -> Iterator[Tensor]:
        """Both ends of each band, in the next one of ``rooms``. What is not seen is empty where its
        line begins."""
        first_line, begin, parts, lines = placed
        total, rooms, width = prod(self.grid), iter(rooms), self.grid[-1]

        def empty(rows: slice, ahead: int) -> Tensor:
            return (begin[rows] + ahead).clamp_(0, total).add_(self.start)

        where = self._rows_of(begin + self.start, first_line, [each[1:3] for each in lines])
        for (distance, _, _, seen), some in zip(lines, where, strict=True):
            ahead, rows = distance * width, slice(some.start, some.stop)
            outside = [slice(0, rows.start), slice(rows.stop, len(begin))]
            valid = None
            if seen is not None:
                line = divided(begin[rows].clone(), width) - first_line
                valid = seen.to(line.dtype).index_select(0, line)
            for part in parts:
                ends = next(rooms)
                torch.add(part[:, rows], ahead, out=ends[:, rows])
                if valid is not None:
                    inside = ends[:, rows] - (begin[rows] + (ahead + self.start))
                    ends[:, rows] = empty(rows, ahead) + inside * valid
                for rest in outside:
                    if rest.start < rest.stop:
                        ends[:, rest] = empty(rest, ahead)
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
