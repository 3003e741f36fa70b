"""What came out: right, or the first module that is not, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from usp.verification.causes import cause
from usp.verification.compare import Comparison, Difference, handed_on
from usp.verification.join import Places, is_exact
from usp.verification.record import Record


@dataclass(frozen=True)
class Failure:
    """A rank that raised, or came no further.

    Attributes:
        rank: Which.
        module: The innermost that it was in; "" in the model's own code, or in the backward.
        error: Of what kind: the name of the exception's class, or "hang".
        message: Its own.
    """

    rank: int
    module: str
    error: str
    message: str

    @property
    def is_consequence(self) -> bool:
        """Whether another rank's failure may be the cause."""
        lost = ("peer", "Timed out", "timeout", "aborted", "other ranks", "on rank")
        return self.error == "hang" or any(word in self.message for word in lost)


@dataclass(frozen=True)
class Verification:
    """The verdict of ``usp.verify``; prints as a sentence or two.

    Attributes:
        ok: Whether outputs, the loss and every parameter's gradient are those of the whole.
        module: Name of the first module that is at fault, as in ``named_modules``; "" is the model
            itself, or its loss; None where all is right.
        kind: "output", "gradient", "error" (a rank raised), "hang", or "random" (another seed
            changes the whole model, so that nothing can be compared); "" where all is right.
        cause: The likely cause in a sentence; "" where all is right.
        error: The largest difference, relative to the largest number of the tensor; inf where
            shapes or integers differ.
        tolerance: Up to which a difference is rounding.
        dtype: In which all was run.
        compared: Tensors that were: outputs, and gradients of parameters.
        where: In the module's code, in words.
        how: The difference in words.
    """

    ok: bool
    module: str | None = None
    kind: str = ""
    cause: str = ""
    error: float = 0.0
    tolerance: float = 0.0
    dtype: torch.dtype = torch.float64
    compared: int = 0
    where: str = ""
    how: str = ""

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if self.ok:
            return (
                f"the same: {self.compared} outputs and gradients within {self.tolerance:.0e} in "
                f"{name}"
            )
        who = self.module or "the model itself"
        if self.kind == "random":
            return f"{who} draws random numbers: {self.cause}"
        if self.kind in ("error", "hang"):
            return f"{who}{self.where}: {self.cause}"
        what = "the gradient" if self.kind == "gradient" else "the output"
        return f"{who}{self.where}: {what} differs ({self.how}, in {name}). Likely: {self.cause}"


def judged(
    model: nn.Module,
    whole: Record,
    outcomes: Sequence[Record | Failure],
    places: Places,
    dtype: torch.dtype,
) -> Verification:
    """The verdict on the runs of all ranks.

    Args:
        model: As it was handed over: classes and parameters of its modules.
        whole: The run on one device.
        outcomes: Of each rank, in the order of the mesh.
        places: Who holds which tokens.
        dtype: Of the runs.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if failures:
        first = min(failures, key=_urgency)
        if first.error == "hang":
            first = replace(first, message=_of_hang(first, failures))
        return _of_failure(first, modules, dtype)
    ranks = [outcome for outcome in outcomes if isinstance(outcome, Record)]
    comparison = Comparison(whole, ranks, places, dtype)
    compared = len(whole.outputs) + len(comparison.parameters) + (whole.loss is not None)
    difference = comparison.first_difference()
    if difference is not None:
        difference = handed_on(difference, comparison)
        name, where = _culprit(difference, whole)
        if difference.kind == "gradient" and comparison.common_factor() is not None:
            name, where = "", ", the loss"
        return Verification(
            False,
            name,
            difference.kind,
            cause(comparison, difference, name, modules.get(name)),
            difference.error,
            comparison.tolerance,
            dtype,
            compared,
            where,
            _in_words(difference),
        )
    dropped = _drops_apart(ranks)
    if dropped is not None:
        far = float("inf")
        return Verification(
            False, dropped, "output", _DROPS, far, 0.0, dtype, compared, "", "other samples"
        )
    return Verification(True, tolerance=comparison.tolerance, dtype=dtype, compared=compared)


_DROPS = (
    "DropPath drops other samples on each rank, which hold parts of one sample: draw it in "
    "usp.rng.replicated(mesh) (usp.parallelize does), and other dropout in usp.rng.sharded(mesh)"
)


def _drops_apart(ranks: Sequence[Record]) -> str | None:
    """The first module that does not drop the same samples on all ranks."""
    for name, kept in ranks[0].kept.items():
        if any(rank.kept.get(name) != kept for rank in ranks):
            return name
    return None


def _in_words(difference: Difference) -> str:
    if difference.joined is None:
        return "another shape"
    if not is_exact(difference.whole):
        return f"{difference.error:.1e} of its largest value"
    return "other integers"


def _culprit(difference: Difference, whole: Record) -> tuple[str, str]:
    """The module whose code is at fault, and where in it."""
    key = difference.key
    if key is None:
        if difference.kind == "gradient":
            owner, _, parameter = difference.name.rpartition(".")
            return owner, f", its {parameter}"
        return "", f", {difference.name}" if difference.name else ", what it returns"
    # what a module was given is made by the code that called it, and so is what goes back to what
    # it has returned
    is_its_own = (key.side == "out") == (difference.kind == "output")
    if is_its_own:
        return key.module, ""
    caller = whole.callers.get((key.module, key.call), "")
    where = "before" if difference.kind == "output" else "behind"
    return caller, f", {where} {key.module or 'the model'}"


def _urgency(failure: Failure) -> tuple[bool, bool, bool, int]:
    """What is no consequence first, then who waits, then who says where."""
    waits = failure.error == "hang"
    return failure.is_consequence, not waits, not failure.module, failure.rank


def _of_hang(first: Failure, failures: Sequence[Failure]) -> str:
    where = (f"rank {f.rank} in {f.module or 'the model itself'}" for f in failures)
    return (
        f"{first.message}, {', '.join(where)}: they wait for each other, as where one of "
        "them skips a collective, or runs backward through other outputs"
    )


def _of_failure(
    failure: Failure, modules: Mapping[str, nn.Module], dtype: torch.dtype
) -> Verification:
    names = sorted((n for n in modules if n and n in failure.message), key=len, reverse=True)
    hang = failure.error == "hang"
    name = failure.module or (names[0] if names else "")
    said = failure.message if hang else f"{failure.error}: {failure.message}"
    return Verification(
        False,
        name,
        "hang" if hang else "error",
        said if hang else f"rank {failure.rank}: {said}",
        float("inf"),
        0.0,
        dtype,
    )
