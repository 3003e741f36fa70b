"""Finds accesses to the same memory that nothing orders: a barrier that is missing, whatever the
numbers say.

Source: PTX ISA, "Memory Consistency Model", "Data races": two accesses conflict that overlap and of
which one writes; they must be ordered by synchronization.
"""

from __future__ import annotations

import numpy as np

from .parse import Refused
from .registers import Array

_MANY = 1 << 30  # more than there are warps or blocks
_SEVERAL = _MANY - 1


class Watch:
    """Who wrote and who read each place last, between two points that order all accesses.

    A place remembers epoch * _MANY + who: what is at least epoch * _MANY is of this epoch.

    Args:
        name: Of the memory.
        kind: Of those whose accesses nothing orders: warps, blocks.
        unit: Bytes that are told apart; accesses are no narrower.

    Attributes:
        who: The warp, or block, whose turn it is.
        epoch: How many such points there were.
    """

    def __init__(self, name: str, size: int, kind: str, unit: int) -> None:
        self.name, self._kind, self._unit = name, kind, unit
        self.who, self.epoch = 0, 0
        self._written, self._read = (np.full(-(-size // unit), -1, np.int64) for _ in range(2))

    def note(self, offsets: Array, width: int, writes: bool) -> None:
        """An access to ``width`` bytes at each offset."""
        unit, start = self._unit, self.epoch * _MANY
        assert width >= unit, (width, unit)
        places = (
            (offsets // unit)[:, None] + np.arange(width // unit)
            if width > unit
            else (offsets // unit)
        )
        self._check(places, self._written[places], "wrote", writes)
        readers = self._read[places]
        if writes:
            self._check(places, readers, "read", writes)
            self._written[places] = start + self.who
        else:
            others = (readers >= start) & (readers != start + self.who)
            self._read[places] = np.where(others, start + _SEVERAL, start + self.who)

    def _check(self, places: Array, last: Array, did: str, writes: bool) -> None:
        start = self.epoch * _MANY
        conflicts = (last >= start) & (last != start + self.who)
        if not conflicts.any():
            return
        place, by = int(places[conflicts][0]), int(last[conflicts][0]) - start
        other = "several" if by == _SEVERAL else f"{self._kind} {by}"
        raise Refused(
            f"a race: {self._kind} {self.who} {'writes' if writes else 'reads'} at"
            f" {place * self._unit:+} of {self.name} what {other} {did}, and nothing orders the two"
        )
