"""Rows that grow at their end, in memory that is got ahead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Buffer:
    """(B, rows, ...) of which more rows come, are moved together, or fall off the end.

    Attributes:
        length: Rows there are.
    """

    def __init__(self, like: Tensor) -> None:
        self.length = 0
        self._memory = like.new_empty((like.shape[0], 0, *like.shape[2:]))

    @property
    def rows(self) -> Tensor:
        """A view of those there are."""
        return self._memory[:, : self.length]

    @property
    def nbytes(self) -> int:
        """Of all its memory."""
        return self._memory.nbytes

    def push(self, x: Tensor) -> None:
        """Rows behind the others; twice the memory where there is too little."""
        stop = self.length + x.shape[1]
        if stop > self._memory.shape[1]:
            size = max(stop, 2 * self._memory.shape[1])
            grown = x.new_empty((x.shape[0], size, *x.shape[2:]))
            grown[:, : self.length] = self.rows
            self._memory = grown
        self._memory[:, self.length : stop] = x
        self.length = stop

    def keep(self, ranges: Sequence[tuple[int, int]]) -> None:
        """These rows alone, ascending."""
        kept = torch.cat([self._memory[:, :0], *(self._memory[:, a:b] for a, b in ranges)], 1)
        self.length = kept.shape[1]
        self._memory[:, : self.length] = kept

    def crop(self, length: int) -> None:
        """The first rows alone; the memory stays."""
        self.length = length

    def select(self, samples: Sequence[int]) -> Buffer:
        """A copy with these samples, in memory just large enough."""
        index = torch.tensor(samples, dtype=torch.int64, device=self._memory.device)
        copy = Buffer(self._memory[:0])
        copy._memory, copy.length = self.rows.index_select(0, index), self.length
        return copy
