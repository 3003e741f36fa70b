"""Of each position how many keys lie below it: looked up where keys lie in many runs."""

from __future__ import annotations

import torch

from usp.planning.positions import Positions

_WIDTH = 1 << 14


class Table:
    """Counts for whole sequences of so many keys."""

    def __init__(self, key_len: int) -> None:
        self._key_len, self._parts = key_len, key_len // _WIDTH + 1
        # what nobody writes takes no memory: there look-ups begin that go ahead
        self._memory = torch.empty((2 * self._parts + 1) * _WIDTH, dtype=torch.int32, device="cpu")

    def fill(self, keys: Positions) -> None:
        """Count these."""
        if keys.period is not None and keys.period[0] <= _WIDTH:
            self._repeat(keys, keys.period[0])
            return
        at, table = keys.written(keys.start.new_empty(len(keys))), self.counts(0)
        parts = table[: self._parts * _WIDTH].zero_().view(-1, _WIDTH)
        table[1:].index_fill_(0, at, 1)
        # threads share rows: each begins with the keys in front of it
        starts = _WIDTH * torch.arange(1, len(parts), device="cpu") - 1
        parts[1:, 0] += torch.searchsorted(at, starts)
        torch.cumsum(parts, 1, dtype=torch.int32, out=parts)

    def _repeat(self, keys: Positions, length: int) -> None:
        """The same of keys that lie alike every so many positions."""
        one, times = keys.counts_of_period, self._key_len // length + 1
        before = one[-1] * torch.arange(times, dtype=torch.int32, device="cpu")[:, None]
        table = self.counts(0)[: times * length].view(times, length)
        torch.add(one[:-1], before, out=table)
        if table.view(-1)[self._key_len] > len(keys):  # the last time is cut off
            table.clamp_max_(len(keys))

    def counts(self, ahead: int) -> torch.Tensor:
        """int32, by positions that lie so far ahead of those that are asked for."""
        return self._memory[self._parts * _WIDTH + ahead :]
