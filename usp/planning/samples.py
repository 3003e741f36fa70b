"""Samples of a batch that share a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from usp.planning.masks.mask import Mask


@dataclass(frozen=True)
class Samples:
    """Neighbours in a batch.

    Attributes:
        start, stop: As in ``range``; a stop of None is the end of the batch.
    """

    start: int = 0
    stop: int | None = None

    @property
    def are_all(self) -> bool:
        return self.start == 0 and self.stop is None

    def count(self, batch: int) -> int:
        """How many they are of so many."""
        return len(range(batch)[self.start : self.stop])

    def of(self, x: Tensor) -> Tensor:
        """(B, ...) -> (own samples, ...), a view; (1, ...) is the same for all."""
        if self.are_all or x.shape[0] == 1:
            return x
        return x[self.start : self.stop]


class Part(NamedTuple):
    """What samples of a batch share.

    Attributes:
        samples: Which they are.
        mask: Who sees whom, by places in the sequences.
        query_offset: Position of the first query among the keys: distances are counted from there,
            the mask knows it already.
    """

    samples: Samples
    mask: Mask
    query_offset: int = 0


# Each sample is in one of the parts.
Masks = tuple[Part, ...]


def masks_of(mask: Mask | Sequence[Mask], query_offset: int | Sequence[int] = 0) -> Masks:
    """One mask for all, or one for each sample: neighbours with equal masks share calls."""
    if isinstance(mask, Mask):
        assert isinstance(query_offset, int)
        return (Part(Samples(), mask, query_offset),)
    offsets = [query_offset] * len(mask) if isinstance(query_offset, int) else query_offset
    each = list(zip(mask, offsets, strict=True))
    if len(set(each)) == 1:
        return (Part(Samples(), *each[0]),)
    starts = [i for i, shared in enumerate(each) if not i or shared != each[i - 1]]
    ends = zip(starts, [*starts[1:], len(each)], strict=True)
    return tuple(Part(Samples(start, stop), *each[start]) for start, stop in ends)
