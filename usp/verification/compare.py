"""Where the ranks' records part from that of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from usp.verification.join import Joined, Places, cut_dim, error, join, scale
from usp.verification.record import Key, Record

# relative to the largest number of a tensor: of runs in a dtype, and of those in fp64 of models
# that compute some of it in a shorter one
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
_ROUNDED = {torch.float64: 1e-9, torch.float32: 1e-5}
_LOOSE = 3e-2
# tensors that are all but zero are compared by the size of the others
_FLOOR = 1e-3


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
        shortest = {run.shortest for run in (whole, *ranks)} - {None}
        inside = max((_ROUNDED.get(short, _LOOSE) for short in shortest if short), default=0.0)
        self.tolerance = max(TOLERANCES.get(dtype, _LOOSE), inside)

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
        scales = [scale(x) for x in self.whole.outputs if x.is_floating_point()]
        floor = _floor(scales)
        for n, whole in enumerate(self.whole.outputs):
            parts = tuple(rank.outputs[n] for rank in self.ranks)
            yield from self._differs("output", None, "", whole, parts, floor, must_fit=True)

    def _of_loss(self) -> Iterator[Difference]:
        whole, parts = self.whole.loss, tuple(rank.loss for rank in self.ranks)
        if whole is None:
            return
        if self.are_reduced and all(part is not None for part in parts):
            # what averages gradients takes the loss, or this rank's part of it, times the ranks
            mean = torch.stack([part.to(whole) for part in parts if part is not None]).mean()
            size = len(parts)
            if any(error(mean * n, whole, 0.0) <= self.tolerance for n in (1, size, 1 / size)):
                return
        yield from self._differs("output", None, "the loss", whole, parts, 0.0)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Gradients of the whole, of parameters that the ranks have by that name."""
        return {
            name: grad
            for name, grad in self.whole.parameters.items()
            if grad is not None and all(name in rank.parameters for rank in self.ranks)
        }

    @property
    def are_reduced(self) -> bool:
        """Whether each rank has the sum of the gradients by now, and not its part."""
        return all(rank.is_reduced for rank in self.ranks)

    def _of_parameters(self) -> Iterator[Difference]:
        wholes = self.parameters
        floor = _floor([scale(g) for g in wholes.values()])
        for name, whole in reversed(wholes.items()):
            parts = tuple(rank.parameters[name] for rank in self.ranks)
            total = self.total(parts, whole)
            far = error(total, whole, floor)
            if not far <= self.tolerance:
                joined = Joined((total,), None)
                yield Difference("gradient", None, name, far, whole, parts, joined)

    def total(self, parts: Sequence[Tensor | None], whole: Tensor) -> Tensor:
        """The gradient of a parameter, of what each rank has of it."""
        there = [part for part in parts if part is not None]
        if self.are_reduced and there:
            return max(there, key=lambda part: error(part, whole, 0.0))
        return sum(there, torch.zeros_like(whole))

    def common_factor(self) -> float | None:
        """That by which the gradient of every parameter is off; None where there is no one such."""
        largest = max((scale(g) for g in self.parameters.values()), default=0.0)
        factors = []
        for name, whole in self.parameters.items():
            if scale(whole) <= 1e-6 * largest:  # rounding of what is zero
                continue
            total = self.total([rank.parameters[name] for rank in self.ranks], whole)
            factors.append(float((total * whole).sum() / (whole * whole).sum()))
            if error(total, factors[-1] * whole, 0.0) > 1e-6:
                return None
        far = max(factors, default=0.0) - min(factors, default=0.0)
        return factors[0] if factors and far <= 1e-6 * abs(factors[0]) else None

    def _of_values(self) -> Iterator[Difference]:
        values = self.whole.values
        floor = _floor([scale(x) for x in values.values() if x.is_floating_point()])
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
        floor = _floor([scale(x) for x in gradients.values()])
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
            far = error(joined.values[0], whole, floor)
            if not far <= self.tolerance:
                yield Difference("gradient", key, "", far, whole, parts, joined)

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
        far = max(error(value, whole, floor) for value in joined.values)
        if whole.dim() == 0 and whole.is_floating_point():  # each its part of it, or all of it
            total = torch.stack([part.to(whole.dtype) for part in there]).sum()
            far = min(far, error(total, whole, floor))
        if not far <= self.tolerance:
            yield Difference(kind, key, name, far, whole, parts, joined)

    def _have_more(self, whole: Tensor, parts: Sequence[Tensor]) -> bool:
        """Whether the ranks have a few tokens more than the whole: some that each rank added."""
        dim = cut_dim(whole.shape, [part.shape for part in parts])
        if dim is None:
            return False
        more = sum(part.shape[dim] for part in parts) - whole.shape[dim]
        return more > 0 and more % (len(parts) - 1) == 0 and more <= 8 * len(parts)

    def joined(self, whole: Tensor, parts: Sequence[Tensor]) -> Joined | None:
        """See ``join``."""
        return join(whole, parts, self.places)


def handed_on(difference: Difference, comparison: Comparison) -> Difference:
    """The same seen from where the tensor came into being: a container that the ranks do not call
    hands on what it was given."""
    key, whole = difference.key, comparison.whole
    while difference.kind == "output" and key is not None and key.side == "in":
        caller = whole.callers.get((key.module, key.call), "")
        event = whole.events[key[:3]]
        calls = [
            found
            for found in whole.values
            if found.module == caller
            and found.side == "in"
            and whole.events[found[:3]] == event - 1
        ]
        if not caller or not calls or all(calls[0] in rank.values for rank in comparison.ranks):
            break
        key = calls[0]
    return replace(difference, key=key)


def _floor(scales: Sequence[float]) -> float:
    return _FLOOR * median(scales) if scales else 0.0
