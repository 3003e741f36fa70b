"""Where the ranks' records part from that of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from usp.planning.layout import Layout
from usp.planning.shares import local_positions, shares
from usp.verification.record import Key, Record

# relative to the largest number of a tensor; what is rounded inside to a shorter dtype
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
ROUNDED = 1e-4
_LOOSE = 3e-2
# tensors that are all but zero are compared by the size of the others
_FLOOR = 1e-3


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


@dataclass(frozen=True)
class Difference:
    """The first tensor in which they differ.

    Attributes:
        kind: "output" or "gradient".
        key: Of the tensor; None where it is the loss, an output of the model or a parameter.
        name: Of a parameter.
        error: Relative to the largest number of the whole one; inf for another shape.
        whole, parts: The tensor of the whole, and of each rank.
        joined: The same as a whole one; None where they cannot be joined.
    """

    kind: str
    key: Key | None
    name: str
    error: float
    whole: Tensor
    parts: tuple[Tensor | None, ...]
    joined: Joined | None


class Comparison:
    """A whole run and the ranks' runs of the same model.

    Args:
        whole: One device.
        ranks: In the order of the mesh.
        places: Who holds which tokens.
        dtype: Of the runs.
    """

    def __init__(
        self, whole: Record, ranks: Sequence[Record], places: Places, dtype: torch.dtype
    ) -> None:
        self.whole, self.ranks, self.places = whole, list(ranks), places
        rounded = whole.is_rounded or any(rank.is_rounded for rank in ranks)
        tolerance = TOLERANCES.get(dtype, _LOOSE)
        self.tolerance = max(tolerance, ROUNDED) if rounded else tolerance

    def first_difference(self) -> Difference | None:
        """None where outputs, loss and every parameter's gradient are those of the whole: what a
        program does on its way is its own."""
        ends = [*self._of_outputs(), *self._of_loss()]
        gradients = [*self._of_parameters()]
        if not ends and not gradients:
            return None
        inner = next(self._of_values(), None)
        if inner is not None:
            return inner
        if ends:
            return ends[0]
        inner = next(self._of_gradients(), None)
        return gradients[0] if inner is None else inner

    # ---------------------------------------------------------------------------------------------

    def _of_outputs(self) -> Iterator[Difference]:
        counts = {len(rank.outputs) for rank in self.ranks} - {len(self.whole.outputs)}
        if counts:
            few = torch.tensor(len(self.whole.outputs))
            yield Difference(
                "output", None, "", float("inf"), few,
                tuple(torch.tensor(len(r.outputs)) for r in self.ranks), None,
            )  # fmt: skip
            return
        scales = [_scale(x) for x in self.whole.outputs if x.is_floating_point()]
        floor = _floor(scales)
        for n, whole in enumerate(self.whole.outputs):
            parts = tuple(rank.outputs[n] for rank in self.ranks)
            yield from self._differs("output", None, "", whole, parts, floor, must_fit=True)

    def _of_loss(self) -> Iterator[Difference]:
        if self.whole.loss is not None:
            whole, parts = self.whole.loss, tuple(rank.loss for rank in self.ranks)
            yield from self._differs("output", None, "the loss", whole, parts, 0.0)

    def _of_parameters(self) -> Iterator[Difference]:
        wholes = {n: g for n, g in self.whole.parameters.items() if g is not None}
        floor = _floor([_scale(g) for g in wholes.values()])
        for name, whole in reversed(wholes.items()):
            if not all(name in rank.parameters for rank in self.ranks):
                continue
            parts = tuple(rank.parameters[name] for rank in self.ranks)
            total = sum((g for g in parts if g is not None), torch.zeros_like(whole))
            error = _error(total, whole, floor)
            if not error <= self.tolerance:
                joined = Joined((total,), None)
                yield Difference("gradient", None, name, error, whole, parts, joined)

    def _of_values(self) -> Iterator[Difference]:
        values = self.whole.values
        floor = _floor([_scale(x) for x in values.values() if x.is_floating_point()])
        passes_on = set(self.whole.callers.values())
        for key, whole in values.items():
            if key.side == "in" and key.module in passes_on and not whole.is_floating_point():
                continue  # whoever reads ids, labels or positions shows whether they are right
            parts = tuple(rank.values.get(key) for rank in self.ranks)
            if any(part is None for part in parts):
                continue
            yield from self._differs("output", key, "", whole, parts, floor)

    def _of_gradients(self) -> Iterator[Difference]:
        gradients = self.whole.gradients
        floor = _floor([_scale(x) for x in gradients.values()])
        for key in reversed(self.whole.values):
            values = [rank.values.get(key) for rank in self.ranks]
            if key not in gradients or not key.module or any(value is None for value in values):
                continue
            parts = tuple(
                rank.gradients.get(key, torch.zeros_like(rank.values[key])) for rank in self.ranks
            )
            whole = gradients[key]
            joined = self.joined(whole, parts)
            if joined is None:
                continue
            if joined.dim is None:
                joined = Joined((sum(parts[1:], parts[0]),), None)
            error = _error(joined.values[0], whole, floor)
            if not error <= self.tolerance:
                yield Difference("gradient", key, "", error, whole, parts, joined)

    def _differs(
        self,
        kind: str,
        key: Key | None,
        name: str,
        whole: Tensor,
        parts: tuple[Tensor | None, ...],
        floor: float,
        must_fit: bool = False,
    ) -> Iterator[Difference]:
        there = [part for part in parts if part is not None]
        if len(there) < len(parts):
            return
        joined = self.joined(whole, there)
        if joined is None:
            if must_fit or self._have_more(whole, there):
                yield Difference(kind, key, name, float("inf"), whole, parts, None)
            return
        error = max(_error(value, whole, floor) for value in joined.values)
        if whole.dim() == 0 and whole.is_floating_point():  # each its part of it, or all of it
            total = torch.stack([part.to(whole.dtype) for part in there]).sum()
            error = min(error, _error(total, whole, floor))
        if not error <= self.tolerance:
            yield Difference(kind, key, name, error, whole, parts, joined)

    def _have_more(self, whole: Tensor, parts: Sequence[Tensor]) -> bool:
        """Whether the ranks have a few tokens more than the whole: some that each rank added."""
        dim = _cut_dim(whole, parts)
        if dim is None:
            return False
        more = sum(part.shape[dim] for part in parts) - whole.shape[dim]
        return more > 0 and more % (len(parts) - 1) == 0 and more <= 8 * len(parts)

    def joined(self, whole: Tensor, parts: Sequence[Tensor]) -> Joined | None:
        """What fits the whole one best, of the ways to join; None where none does."""
        if all(part.shape == whole.shape for part in parts):
            return Joined(tuple(parts), None)
        dim = _cut_dim(whole, parts)
        if dim is None:
            return None
        found = list(self._ways(whole, parts, dim))
        return min(found, key=lambda way: _error(way.values[0], whole, 0.0), default=None)

    def _ways(self, whole: Tensor, parts: Sequence[Tensor], dim: int) -> Iterator[Joined]:
        sizes, length = [part.shape[dim] for part in parts], whole.shape[dim]
        ranks = torch.arange(len(parts))
        for tokens in range(1, length + 1):
            # (batch, tokens) or (tokens, batch) may have been flattened
            samples, rest = divmod(length, tokens)
            if rest or (held := self.places.held(tokens)) is None:
                continue
            if sizes != [samples * n for n in held]:
                continue
            order = self.places.order(tokens)
            owner = torch.empty_like(order)
            owner[order] = ranks.repeat_interleave(torch.tensor(held))
            for first in {samples, 1} if samples > 1 else {1}:
                second = samples // first
                split = [p.unflatten(dim, (first, -1, second)) for p in parts]
                value = torch.cat(split, dim + 1)
                back = torch.empty_like(value).index_copy_(dim + 1, order, value)
                owners = owner[None, :, None].expand(first, -1, second).flatten()
                yield Joined((back.flatten(dim, dim + 2),), dim, owners)
        if sum(sizes) == length:
            owners = ranks.repeat_interleave(torch.tensor(sizes))
            yield Joined((torch.cat(list(parts), dim),), dim, owners)


def _cut_dim(whole: Tensor, parts: Sequence[Tensor]) -> int | None:
    """The only dim in which they differ."""
    if any(part.dim() != whole.dim() for part in parts):
        return None
    dims = [d for d in range(whole.dim()) if any(p.shape[d] != whole.shape[d] for p in parts)]
    return dims[0] if len(dims) == 1 else None


def wrong_entries(whole: Tensor, joined: Joined, tolerance: float) -> list[Tensor]:
    """For each of the joined values (entries along its dim,) or (), whether it differs."""
    scale = max(_scale(whole), 1e-30) if whole.is_floating_point() else 1.0
    found = []
    for value in joined.values:
        off = ~(_distance(value, whole) <= tolerance * scale)
        dims = [d for d in range(off.dim()) if d != joined.dim]
        found.append(off.amax(dims) if dims else off)
    return found


def _distance(a: Tensor, b: Tensor) -> Tensor:
    if not (a.is_floating_point() or a.is_complex()):
        return (a != b).double()
    b = b.to(a.dtype)
    same = (a == b) | ((a != a) & (b != b))
    return torch.where(same, torch.zeros_like(a.abs()), (a - b).abs()).nan_to_num(nan=torch.inf)


def _error(value: Tensor, whole: Tensor, floor: float) -> float:
    """Largest, relative to the largest of the whole; integers differ or do not."""
    if not value.numel():
        return 0.0
    largest = float(_distance(value, whole).max())
    if not value.is_floating_point():
        return torch.inf if largest else 0.0
    return largest / max(_scale(whole), floor, 1e-30)


def _scale(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _floor(scales: Sequence[float]) -> float:
    return _FLOOR * median(scales) if scales else 0.0
