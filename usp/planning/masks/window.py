"""Windows of the dims of a grid, and the lines of keys that queries see through them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


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
        (2, n) room for them, of which ``x`` itself may be the second half."""
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

    def sees(self, x: Tensor) -> Tensor:
        """(offsets, n) bool, whether a coordinate sees the key so many steps away."""
        first, stop = self.interval(x)
        place = x if self.dilation == 1 else x // self.dilation
        offsets = torch.tensor(self.offsets, dtype=x.dtype, device=x.device)[:, None]
        return (first - place <= offsets) & (stop - place > offsets)


class Lines(NamedTuple):
    """Lines of queries that see something of the keys so many lines away.

    Attributes:
        distance: In lines.
        first, stop: From which line on, and up to which, counted from that of the first query.
        seen: (all lines,) bool which ones; None for all of these.
    """

    distance: int
    first: int
    stop: int
    seen: Tensor | None


@lru_cache(maxsize=2)  # ranks ask for the queries of all of them
def lines_of(windows: tuple[Window, ...], first_line: int, last_line: int) -> list[Lines]:
    """Lines of keys that queries see whole or in part, by their distance from the query's own.

    Args:
        windows: Of all dims but the last.
        first_line, last_line: Of the queries.
    """
    lines = torch.arange(first_line, last_line + 1, dtype=torch.int32, device="cpu")
    inner = prod(window.size for window in windows)
    seen = ((lines >= 0) & (lines < inner))[None]
    distances = torch.zeros(1, dtype=torch.int64, device="cpu")
    for window in windows:
        inner //= window.size
        each = window.sees(lines // inner % window.size)
        steps = torch.tensor(window.offsets, device="cpu") * window.dilation
        distances = (distances[:, None] * window.size + steps).flatten()
        seen = (seen[:, None] & each).flatten(0, 1)
    if (distances.diff() <= 0).any():  # several ways to a line, or not in order
        distances, way = distances.unique(return_inverse=True)
        ways = torch.zeros(len(distances), len(lines), dtype=torch.int32, device="cpu")
        seen = ways.index_add_(0, way, seen.int()) > 0
    flags = seen.view(torch.int8)
    first, stop = flags.argmax(1), len(lines) - flags.flip(1).argmax(1)
    each_way = (x.tolist() for x in (distances, first, stop, flags.sum(1)))
    return [
        Lines(distance, start, end, which if count < end - start else None)
        for distance, start, end, count, which in zip(*each_way, seen, strict=True)
        if count
    ]
