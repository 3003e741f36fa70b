"""What the ranks hold, as a whole tensor, and how far that is from the one of one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from usp.planning.layout import Layout
from usp.planning.shares import local_positions, shares


@dataclass(frozen=True)
class Places:
    """Who holds which tokens.

    Attributes:
        degrees: Of the ring and of Ulysses.
        layout: Of the tokens.
    """

    degrees: tuple[int, int]
    layout: Layout

    @property
    def size(self) -> int:
        return self.degrees[0] * self.degrees[1]

    def held(self, length: int) -> tuple[int, ...] | None:
        """Tokens of each rank; None where the layout is made for another length."""
        if not isinstance(self.layout, str) and self.layout.seq_len != length:
            return None
        return shares(self.layout, length, *self.degrees)

    def order(self, length: int) -> Tensor:
        """Global positions of the tokens of all ranks, one rank behind the other."""
        ring, ulysses = self.degrees
        ranks = [(r, u) for r in range(ring) for u in range(ulysses)]
        return torch.cat([local_positions(self.layout, length, *self.degrees, at) for at in ranks])


@dataclass(frozen=True)
class Joined:
    """What the ranks hold of a tensor, as a whole one.

    Attributes:
        values: Like the whole one; of each rank where each holds all of it.
        dim: Along which it is cut; None where each rank holds all of it.
        owners: Rank of each entry along ``dim``.
    """

    values: tuple[Tensor, ...]
    dim: int | None
    owners: Tensor | None = None


def join(whole: Tensor, parts: Sequence[Tensor], places: Places) -> Joined | None:
    """What fits the whole one best, of the ways to join; None where none does."""
    if all(part.shape == whole.shape for part in parts):
        return Joined(tuple(parts), None)
    dim = cut_dim(whole.shape, [part.shape for part in parts])
    if dim is None:
        return None
    found = list(_ways(whole, parts, dim, places))
    return min(found, key=lambda way: error(way.values[0], whole, 0.0), default=None)


def _ways(whole: Tensor, parts: Sequence[Tensor], dim: int, places: Places) -> Iterator[Joined]:
    sizes, length = [part.shape[dim] for part in parts], whole.shape[dim]
    ranks = torch.arange(len(parts))
    for tokens in range(1, length + 1):
        # (batch, tokens) or (tokens, batch) may have been flattened
        samples, rest = divmod(length, tokens)
        if rest or (held := places.held(tokens)) is None:
            continue
        if sizes != [samples * n for n in held]:
            continue
        order = places.order(tokens)
        owner = torch.empty_like(order)
        owner[order] = ranks.repeat_interleave(torch.tensor(held))
        for first in (samples, 1) if samples > 1 else (1,):
            second = samples // first
            split = [
                part.unflatten(dim, (first, n, second)) for part, n in zip(parts, held, strict=True)
            ]
            value = torch.cat(split, dim + 1)
            back = torch.empty_like(value).index_copy_(dim + 1, order, value)
            owners = owner[None, :, None].expand(first, -1, second).flatten()
            yield Joined((back.flatten(dim, dim + 2),), dim, owners)
    if sum(sizes) == length:
        owners = ranks.repeat_interleave(torch.tensor(sizes))
        yield Joined((torch.cat(list(parts), dim),), dim, owners)


def cut_dim(whole: Sequence[int], parts: Sequence[Sequence[int]]) -> int | None:
    """The only dim in which shapes differ."""
    if any(len(part) != len(whole) for part in parts):
        return None
    dims = [d for d, n in enumerate(whole) if any(part[d] != n for part in parts)]
    return dims[0] if len(dims) == 1 else None


def index_of(
    whole: Sequence[int], parts: Sequence[Sequence[int]], rank: int, places: Places
) -> tuple[int, Tensor] | None:
    """The dim along which shapes are cut, and this rank's entries of it; None where they are not.

    They are those of ``join`` where there is one way.
    """
    dim = cut_dim(whole, parts)
    if dim is None:
        return None
    entries = [torch.empty(part[dim], dtype=torch.int64) for part in parts]
    for way in _ways(torch.arange(whole[dim]), entries, 0, places):
        if way.owners is not None:
            return dim, (way.owners == rank).nonzero()[:, 0]
    return None


def wrong_entries(whole: Tensor, joined: Joined, tolerance: float) -> list[Tensor]:
    """For each of the joined values (entries along its dim,) or (), whether it differs."""
    largest = 1.0 if is_exact(whole) else max(scale(whole), 1e-30)
    found = []
    for value in joined.values:
        off = ~(distance(value, whole) <= tolerance * largest)
        dims = [d for d in range(off.dim()) if d != joined.dim]
        found.append(off.amax(dims) if dims else off)
    return found


def is_exact(x: Tensor) -> bool:
    """Whether it holds integers or truth values."""
    return not (x.is_floating_point() or x.is_complex())


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Of each entry; of integers 1 where they differ."""
    if is_exact(a):
        return (a != b).double()
    b = b.to(a.dtype)
    same = (a == b) | ((a != a) & (b != b))
    return torch.where(same, torch.zeros_like(a.abs()), (a - b).abs()).nan_to_num(nan=torch.inf)


def error(value: Tensor, whole: Tensor, floor: float) -> float:
    """Largest, relative to the largest of the whole; integers differ or do not."""
    if not value.numel():
        return 0.0
    largest = float(distance(value, whole).max())
    if is_exact(value):
        return torch.inf if largest else 0.0
    return largest / max(scale(whole), floor, 1e-30)


def scale(x: Tensor) -> float:
    """The largest finite number."""
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
