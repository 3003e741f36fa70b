"""The kernel families, and the choice among them.

A backend is a module. Each says in plain sentences why it cannot take a problem; ``"auto"``
takes the first without reasons, in the order that ``preference.py`` has for the device; a named
backend never falls back. What no committed result covers has to be right first (``trust.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from usp.backends import _local, native, reference, sdpa, triton, trust
from usp.backends.library import LIBRARIES, HubBackends, trusted
from usp.backends.preference import Source, preference, sources
from usp.kernels import interpreted
from usp.machine import verdicts
from usp.planning.problem import Block, Gradients, Saved, State, Traits

Partial = tuple[slice, Tensor, Tensor]


class Backend(Protocol):
    """One kernel family.

    It may have ``PACKAGES``, distributions whose versions matter to what was found out about it;
    ``MAX_BANDS``, how many bands its kernels take at once by type of device, where not one; and a
    **variant**, kernels that take some calls from its others once they were found right:
    ``variant(traits)`` names it or is None, in ``only_variant()`` it does what it can, and
    ``use_variant(traits)`` lets it do so from then on.
    """

    NAME: str
    CARRIES_STATE: bool
    OVERWRITES: bool  # takes gradients that are to be overwritten

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine at all, or None."""

    def reasons_against(self, traits: Traits) -> tuple[str, ...]:
        """Why it cannot take a problem; empty where it can."""

    def attention_backward(self, block: Block, saved: Saved, grads: Gradients) -> None:
        """Add the gradients of ``block`` to ``grads``, or overwrite them."""


class StateBackend(Backend, Protocol):
    """A family whose kernels carry the running softmax in and out."""

    def attention_forward(self, block: Block, state: State) -> None:
        """Let ``block`` into ``state``, in place."""

    def delta(self, dout: Tensor, out: Tensor) -> Tensor:
        """Sums of ``dout * out`` over the last dim, (B, H, Lq) in the dtype of the state."""


class OnceBackend(Backend, Protocol):
    """A family that makes all results of a block that is alone, without bias, ALiBi and dropout."""

    def attention_once(self, block: Block) -> tuple[Tensor, Tensor]:
        """``out, lse``."""

    def attention_once_backward(
        self, block: Block, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``dq, dk, dv``."""


class PartialBackend(Backend, Protocol):
    """A family that computes rows on their own; ``block.py`` merges them."""

    def attention_partials(self, block: Block) -> Iterator[Partial]:
        """``(rows, out, lse)`` of runs of rows: (B, n, H, Dv) and (B, H, n) of this block."""


# What carries the state before what does not, what takes everything, and what is asked for by name.
TABLE: tuple[StateBackend | PartialBackend, ...] = (triton, native, sdpa, reference, *LIBRARIES)
_hub = HubBackends()  # never "auto"


def backends() -> dict[str, str]:
    """Every backend by name, with "can run here" or the reason why not."""
    return {backend.NAME: backend.unavailable() or "can run here" for backend in (*TABLE, *_hub)}


def use_kernel(
    repository: str,
    *,
    version: int | None = None,
    revision: str | None = None,
    download: bool = False,
    device_type: str = "cuda",
) -> str:
    """Load a kernel of the Hugging Face hub as a backend, which is then asked for by its name.

    It must be in the convention of flash-attn 2 or 3, with the private functions that return an LSE
    and take one: ``_flash_attn_forward``, ``_flash_attn_backward``, and in 2 those of packed
    sequences. ``"auto"`` never takes it. On a mesh every rank loads it.

    Args:
        repository: ``"owner/name"``, as ``"kernels-community/flash-attn2"``.
        version, revision: Which one; exactly one of the two.
        download: Whether it may be fetched where it is not on this machine: it is code that then
            runs here.
        device_type: Of the tensors that it takes.

    Returns:
        The name, for ``backend=``.

    Raises:
        ValueError: the name is none, or not exactly one of version and revision is given.
        NotImplementedError: it cannot be loaded here; says why.
    """
    return _hub.use(
        repository,
        version=version,
        revision=revision,
        download=download,
        device_type=device_type,
    )


def max_bands(backend: Backend, device: torch.device) -> int:
    """How many bands a visit may have that its kernels are given."""
    return int(getattr(backend, "MAX_BANDS", {}).get(device.type, 1))


def check_name(name: str) -> None:
    """Refuse an unknown backend.

    Raises:
        ValueError: names it and those there are.
    """
    if name == "auto":
        return
    names = [backend.NAME for backend in (*TABLE, *_hub)]
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"unknown backend {name!r}: use auto or one of {', '.join(names)}")


def order_of(architecture: str, device: torch.device | None = None) -> tuple[Source, ...]:
    """What says who is asked first on a device: the first of these comes first.

    Args:
        architecture: As ``kernels.architecture`` names it.
        device: Of that architecture, where it is here: it may have been measured.
    """
    row = None if device is None else _local.recall(device, packages())
    return sources(architecture, preference(architecture), row, trusted(architecture))


def in_order(
    architecture: str, device: torch.device | None = None
) -> tuple[StateBackend | PartialBackend, ...]:
    """Every backend, in the order in which "auto" asks them; arguments as in ``order_of``."""
    return _in_order(TABLE, order_of(architecture, device))


@lru_cache(maxsize=64)
def _in_order(
    table: tuple[StateBackend | PartialBackend, ...], said: tuple[Source, ...]
) -> tuple[StateBackend | PartialBackend, ...]:
    """First those that are named, and then the others as they stand."""
    names = list(dict.fromkeys(name for source in said for name in source.names))
    rank = {name: place for place, name in enumerate(names)}
    return tuple(sorted(table, key=lambda backend: rank.get(backend.NAME, len(names))))


def packages() -> tuple[str, ...]:
    """Distributions whose versions matter to what was measured here."""
    return _packages(TABLE)


@lru_cache(maxsize=8)
def _packages(table: tuple[StateBackend | PartialBackend, ...]) -> tuple[str, ...]:
    named = (getattr(backend, "PACKAGES", ()) for backend in table)
    return tuple(sorted({name for names in named for name in names}))


def select(name: str, traits: Traits) -> StateBackend | PartialBackend:
    """The backend for a problem.

    Args:
        name: "auto" for the first that takes it and is right, or one by name, which never falls
            back.
        traits: The problem.

    Raises:
        ValueError: no backend has that name.
        NotImplementedError: none, or not the named one, takes the problem, or it was seen to be
            wrong on this machine; gives every reason.
    """
    check_name(name)
    against: list[str] = []
    left_out: list[tuple[str, str]] = []
    candidates = in_order(traits.architecture, traits.device)
    if name != "auto":
        candidates = tuple(backend for backend in (*TABLE, *_hub) if name == backend.NAME)
    for backend in candidates:
        reasons = backend.reasons_against(traits)
        if not reasons:
            seen = trust.wrong_with(backend, traits, _is_covered)
            if seen is None:
                trust.say(left_out, backend.NAME)
                return backend
            left_out.append((backend.NAME, seen))
            reasons = (f"it was checked on this machine, and {seen} ({verdicts.advice()})",)
        against += [f"{backend.NAME}: {reason}" for reason in reasons]
    raise NotImplementedError(f"backend={name!r} cannot take this problem: " + "; ".join(against))


class Selected(NamedTuple):
    """A backend that was selected for a problem, and whether it would be again.

    Attributes:
        backend, traits: Which, for what.
        changes: Of orders that were measured here, until then.
    """

    backend: Backend
    traits: Traits
    changes: int

    @classmethod
    def now(cls, backend: Backend, traits: Traits) -> Selected:
        """One that ``select`` has just found."""
        return cls(backend, traits, _local.changes())

    def holds(self) -> bool:
        """Whether nothing that can change in a process speaks against it."""
        backend, traits, changes = self
        return (
            changes == _local.changes()
            and not backend.reasons_against(traits)
            and trust.wrong_with(backend, traits, _is_covered) is None
        )


class Tuned(NamedTuple):
    """What ``tune`` found.

    Attributes:
        row: The order from now on, and times over the fastest one's.
        cases: How many were measured.
        left_out: Names of families, and why they were not measured to the end.
        kept: Where later processes find the row, or why they do not.
    """

    row: _local.LocalRow
    cases: int
    left_out: dict[str, str]
    kept: str


def tune(device: torch.device, seconds: float = 120.0) -> Tuned:
    """Measure every backend on a device, and let "auto" ask the fastest first from now on.

    Attention of usual sizes with its backward, in turn. Each is checked against the reference
    first, whatever was found before; what is wrong is not timed.

    Args:
        device: One CPU or GPU, whose kind all of its kind here share.
        seconds: About so long, and then what checking and compiling take.

    Raises:
        RuntimeError: nothing could be measured.
    """
    from usp.backends import _timing

    if interpreted():
        raise RuntimeError("Triton interprets its kernels here (TRITON_INTERPRET): nothing to time")
    found = _timing.measure(TABLE, device, seconds)
    row = found.row()
    kept = f"kept in {_local.store()}; usp tune --forget undoes it"
    try:
        _local.keep(device, packages(), row)
    except OSError as error:
        kept = f"it holds for this process alone, {error}: set TRITON_CACHE_DIR to another folder"
    return Tuned(row, len(found.ratios), found.left_out, kept)


def forget_order(device: torch.device) -> None:
    """What ``tune`` has found out about a device no longer counts.

    Raises:
        OSError: the file that holds it cannot be written.
    """
    _local.drop(device, packages())


def _is_covered(name: str, traits: Traits) -> bool:
    return name in preference(traits.architecture).order
