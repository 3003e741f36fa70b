"""Positions among the keys of all owners: how many of each lie below, and whose lie between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from usp.planning.here import Here
from usp.planning.memory import uninitialised
from usp.planning.positions import FEW_RUNS, Positions
from usp.planning.rows import all_rows
from usp.planning.walk import run_of_each

# Up to so many owners, and runs of theirs, are told by bits.
_FEW_OWNERS = 31
_FEW_SPANS = 32


def _are_few(keys: Sequence[Positions]) -> bool:
    """Whether each owner's keys are counted by a formula."""
    return keys[0].stride > 1 or all(len(owned.start) <= FEW_RUNS for owned in keys)


def counted_below(keys: Sequence[Positions], ends: Tensor, key_len: int) -> Iterator[Tensor]:
    """Of each owner, how many of all its keys lie below each of (2, n) int32; what is found stands
    until the next one is asked for."""
    inside, whose, mine, out = uninitialised(4, *ends.shape, dtype=torch.int32)
    if _are_few(keys):
        yield from (owned.count_below(ends, out) for owned in keys)
        return
    # the run of all owners in which an end lies is looked up once
    runs = _Runs(keys, key_len, ends.numel())
    run = runs.at(ends).flatten()

    def look_up(table: Tensor, into: Tensor) -> Tensor:
        torch.index_select(table, 0, run, out=into.flatten())
        return into

    torch.sub(ends, look_up(runs.start, mine), out=inside)
    torch.minimum(inside, look_up(runs.counts, mine), out=inside)
    look_up(runs.owner, whose)
    for rank in range(len(keys)):
        own = runs.counts * (runs.owner == rank)
        look_up(own.cumsum(0, dtype=torch.int32) - own, out)
        yield out.addcmul_(inside, torch.eq(whose, rank, out=mine))


class _Runs:
    """The runs of the keys of all owners, of stride 1, and between them runs of nobody's.

    Attributes:
        start, counts, owner: (runs,) int32; nobody's have no keys, and owner -1.
    """

    def __init__(self, keys: Sequence[Positions], key_len: int, look_ups: int) -> None:
        counts = torch.cat([owned.counts for owned in keys])
        held = counts.nonzero().flatten()
        owner = run_of_each(torch.tensor([len(owned.start) for owned in keys], device="cpu"))
        start = torch.cat([owned.start for owned in keys]).index_select(0, held)
        counts, owner = (each.index_select(0, held) for each in (counts, owner))
        start, order = start.sort(stable=True)
        counts, owner = counts.index_select(0, order), owner.index_select(0, order)
        begin = F.pad(start + counts, (1, 0))
        gaps = begin < F.pad(start, (0, 1), value=max(key_len, 1))
        if gaps.any():
            start, order = torch.cat((start, begin[gaps])).sort(stable=True)
            more = len(start) - len(counts)
            counts = F.pad(counts, (0, more)).index_select(0, order)
            owner = F.pad(owner, (0, more), value=-1).index_select(0, order)
        self.start, self.counts, self.owner = start.int(), counts.int(), owner.int()
        begins = Positions(start[1:] - 1, start[1:], 1)
        self._begins = Here(begins, all_rows(len(begins)), key_len, look_ups)
        self._begins.expect(1)

    def at(self, positions: Tensor, ahead: int = 0) -> Tensor:
        """Which runs lie so far ahead of positions, int32; any one ahead of position 0."""
        found = uninitialised(1, positions.numel(), dtype=torch.int32)
        return self._begins.count_below(positions.view(1, -1), found, ahead=ahead).view_as(
            positions
        )


def seeing(keys: Sequence[Positions], ends: Tensor, key_len: int) -> Iterator[Tensor]:
    """Of each owner, which stretches see any of its keys.

    Args:
        ends: (2, bands, stretches) int32, between which positions they see of each band.
    """
    if _are_few(keys):
        for low, high in counted_below(keys, ends, key_len):
            yield (high.sub_(low).amax(0) > 0).nonzero().flatten()
        return
    runs = _Runs(keys, key_len, ends.numel())
    # the run in which one end lies, and how many there are up to that of the last key before the
    # other: none where nothing is between them
    first, some = runs.at(ends[0]), (ends[1] - ends[0]).clamp_max_(1)
    spans = runs.at(ends[1], -1).sub_(first).add_(1).mul_(some)
    total, most = len(runs.owner), int(spans.amax())
    if len(keys) <= _FEW_OWNERS and most <= _FEW_SPANS:
        # bits of the owners of so many runs, from each one on
        bits, each = (runs.owner >= 0) << runs.owner.clamp_min(0), [torch.zeros_like(runs.owner)]
        for i in range(most):
            each.append(each[-1] | F.pad(bits[i:], (0, min(i, total))))
        table, seen = torch.cat(each), bits.new_zeros(ends.shape[2])
        for band in spans.mul_(total).add_(first):
            seen |= table.index_select(0, band)
        yield from ((seen >> rank & 1).nonzero().flatten() for rank in range(len(keys)))
        return
    every = torch.arange(total, dtype=torch.int32, device="cpu")
    for rank in range(len(keys)):
        own = every.masked_fill(runs.owner != rank, 2 * total)
        away = own.flip(0).cummin(0).values.flip(0).sub_(every)  # the next one, from each run on
        torch.index_select(away, 0, first.flatten(), out=some.view(-1))
        yield (torch.sub(spans, some, out=some).amax(0) > 0).nonzero().flatten()
