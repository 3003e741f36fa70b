"""Rows that change places: what a rank sends and gets, pure data.

Any rank may hold what any other needs. A row goes to its new place in its mesh row first and from
there along the ring, so two exchanges along the axes of a mesh carry it, and one where the mesh
has one axis. What stays on its rank is not in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from usp.planning.layout import Layout, rows
from usp.planning.shares import shares

_HOST = torch.device("cpu")


@dataclass(eq=False)
class Moves:
    """Of one rank.

    Attributes:
        stays: (2, n) int64, the rows that stay: where they were and where they go.
        leaves: Rows that leave, in the order of the ranks of the mesh row that they go to.
        row_send, row_recv: How many go to each rank of the mesh row and come from it.
        passes: The rows that came, in the order of the ring ranks that they go to.
        ring_send, ring_recv: How many go to each rank of the ring and come from it.
        arrives: Where those that come at last go.
    """

    stays: Tensor
    leaves: Tensor
    row_send: list[int]
    row_recv: list[int]
    passes: Tensor
    ring_send: list[int]
    ring_recv: list[int]
    arrives: Tensor

    @cached_property
    def _on_device(self) -> dict[torch.device, tuple[Tensor, ...]]:
        return {}

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """``stays``, ``leaves``, ``passes`` and ``arrives``, copied to ``device`` once."""
        if device not in self._on_device:
            tables = self.stays, self.leaves, self.passes, self.arrives
            self._on_device[device] = tuple(table.to(device) for table in tables)
        return self._on_device[device]


@lru_cache(maxsize=64)
def shift_moves(
    layout: Layout, seq_len: int, degrees: tuple[int, int], place: tuple[int, int], shift: int
) -> Moves:
    """How the token at each position comes to be that of ``shift`` positions on, modulo the length.

    Args:
        layout, seq_len: The whole sequence.
        degrees, place: Of the ring and of Ulysses, and this rank's ranks along them.
        shift: 0 to ``seq_len - 1``; 0 for an empty sequence.
    """
    (ring, ulysses), (ring_rank, ulysses_rank) = degrees, place
    counts = torch.tensor(shares(layout, seq_len, *degrees), device=_HOST)
    starts = counts.cumsum(0) - counts
    # A slot is a place in the shards of all ranks, one behind the other.
    position = torch.cat([row.tensor for row in rows(layout, seq_len, ring)])
    slot = torch.empty_like(position)
    slot[position] = torch.arange(seq_len, device=_HOST)
    rank_of = torch.arange(ring * ulysses, device=_HOST).repeat_interleave(counts)
    me, first = ring_rank * ulysses + ulysses_rank, ring_rank * ulysses

    def slots(start: int, stop: int) -> Tensor:
        """Of the ranks from ``start`` to before ``stop``."""
        begin = int(starts[start])
        return torch.arange(begin, begin + int(counts[start:stop].sum()), device=_HOST)

    def moved(here: Tensor, by: int) -> Tensor:
        return slot[(position[here] + by) % max(seq_len, 1)]

    mine = slots(me, me + 1)
    to, source = moved(mine, shift), moved(mine, -shift)
    stays = rank_of[to] == me
    row = slots(first, first + ulysses)  # all that may come by this rank on its way
    row_to = moved(row, shift)
    comes = (rank_of[row_to] != rank_of[row]) & (rank_of[row_to] % ulysses == ulysses_rank)
    by, by_to = row[comes], row_to[comes]
    away = to[~stays]
    by_rank, of_place = rank_of[away] % ulysses, torch.arange(len(away), device=_HOST)
    leaves = of_place[_order(by_rank, away)]
    came = by[_order(rank_of[by], by_to)]
    came_to = moved(came, shift)
    far = rank_of[source] != me
    source_ring = rank_of[source[far]] // ulysses
    arrives = torch.arange(len(mine), device=_HOST)[far]
    return Moves(
        stays=torch.stack((mine[stays], to[stays])) - starts[me],
        leaves=torch.arange(len(mine), device=_HOST)[~stays][leaves],
        row_send=by_rank.bincount(minlength=ulysses).tolist(),
        row_recv=(rank_of[by] - first).bincount(minlength=ulysses).tolist(),
        passes=came_to.argsort(),
        ring_send=(rank_of[came_to] // ulysses).bincount(minlength=ring).tolist(),
        ring_recv=source_ring.bincount(minlength=ring).tolist(),
        arrives=arrives[_order(source_ring, arrives)],
    )


def _order(major: Tensor, minor: Tensor) -> Tensor:
    """Indices that sort by ``major``, and where it is equal by ``minor``."""
    by_minor = minor.argsort()
    return by_minor[major[by_minor].argsort(stable=True)]
