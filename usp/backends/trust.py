"""Never trust a kernel blindly: who is covered by no committed result is tried first.

At its first use for a dtype, head dims and options it is held against the reference on small
problems: on a GPU in a process of its own, which may fault, on a CPU in a thread. The verdict is
kept on disk for this device, driver and these versions. Who is wrong is left out, and said once.

Ranks of a mesh may come to different verdicts, on different machines say: what travels between
them does not depend on whose kernels compute.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch

from usp.backends import _self_check
from usp.kernels import interpreted
from usp.machine import verdicts
from usp.machine.apart import begin
from usp.planning.problem import Traits

# It is what others are compared with.
REFERENCE = "reference"
_MOST, _NOT_ASKED = 4096, ""
_found: dict[tuple[Any, Traits], str | None] = {}
_said: set[tuple[str, str]] = set()


def wrong_with(backend: Any, traits: Traits, covered: Callable[[str, Traits], bool]) -> str | None:
    """What was seen to be wrong with a family for a problem that it takes; None where it may run.

    Args:
        backend: A family of ``backends.TABLE``.
        traits: Of the problem.
        covered: Whether a committed result of such a device has judged a family of that name.
    """
    key = backend, traits
    found = _found.get(key, _NOT_ASKED)
    if found is not _NOT_ASKED:
        return found if found is None or verdicts.are_asked_for() else None
    if not verdicts.are_asked_for() or verdicts.must_wait(_device(traits)):
        return None
    # Triton's interpreter is for looking at kernels, and very slow
    free = backend.NAME == REFERENCE or covered(backend.NAME, traits) or interpreted()
    seen = None if free else _checked(backend, traits)
    if seen is None:
        _try_variant(backend, traits)
    if len(_found) >= _MOST:
        _found.clear()
    _found[key] = seen
    return seen


def check_again(pairs: Sequence[tuple[Any, Traits]]) -> list[str | None]:
    """What is wrong with families for problems now, whatever was kept or is covered.

    Args:
        pairs: Families of ``backends.TABLE``, on one kind of device; the reference is right.
    """
    asked = [pair for pair in pairs if pair[0].NAME != REFERENCE]
    about = [subject(*pair) for pair in asked]
    apart = bool(asked) and in_own_process(asked[0][1])
    found = dict(zip(asked, verdicts.find_out(about, apart=apart), strict=True))
    _found.update(found)
    for pair in asked:
        if found[pair] is None:
            _try_variant(*pair)
    return [found.get(pair) for pair in pairs]


def _try_variant(backend: Any, traits: Traits) -> None:
    """Let kernels do the work of a family's others, if there are such and they are right.

    No committed result covers them: a row tells of the family as a whole.
    """
    name = backend.variant(traits) if hasattr(backend, "variant") else None
    if name is None:
        return
    seen = verdicts.wrong_with(subject(backend, traits, name), apart=in_own_process(traits))
    if seen is None:
        backend.use_variant(traits)
    else:
        _warn(f"{name} kernels of backend {backend.NAME!r} are", seen, "its others run")


def _checked(backend: Any, traits: Traits) -> str | None:
    about = subject(backend, traits)
    if _module(backend) is None and all(backend is not each for each in _table()):
        # this process alone has it, from a hub: no other could try it, nor trust what was kept
        return verdicts.find_out([about], apart=False)[0]
    return verdicts.wrong_with(about, apart=in_own_process(traits))


def say(left_out: Sequence[tuple[str, str]], instead: str) -> None:
    """Warn of families that are left out, of each finding once.

    Args:
        left_out: Names, and what was seen.
        instead: Who runs.
    """
    for name, seen in left_out:
        _warn(f"backend {name!r} is", seen, f"{instead!r} runs")


def _warn(who: str, seen: str, instead: str) -> None:
    if (who, seen) not in _said:
        _said.add((who, seen))
        message = f"{who} left out here: {seen}. {instead} instead. ({verdicts.advice()})"
        warnings.warn(message, stacklevel=4)


def forget() -> None:
    """Ask anew what this process has asked; what is on disk stays."""
    _found.clear()
    _said.clear()
    verdicts.forget()


def in_own_process(traits: Traits) -> bool:
    """Whether a fault would cost this process its device."""
    return traits.device_type != "cpu"


def subject(backend: Any, traits: Traits, variant: str | None = None) -> verdicts.Subject:
    """A family, or its variant, with a dtype, head dims and options, on a device.

    Kernels of the CPU take any head dim alike; those of a GPU are compiled for each.
    """
    device = _device(traits)
    dims = (40, 40) if device.type == "cpu" else (traits.head_dim, traits.value_head_dim)
    options = [name for name in _self_check.OPTIONS if getattr(traits, name)]
    dtype = str(traits.dtype).removeprefix("torch.")
    told = {
        "family": backend.NAME,
        "module": _module(backend),
        "variant": variant,
        "device": str(device),
        "dtype": dtype,
        "dims": dims,
        "options": options,
    }
    who = backend.NAME if variant is None else f"{backend.NAME} ({variant})"
    name = f"{who}, {dtype}, head dims {dims[0]} and {dims[1]}"
    name += f", with {', '.join(options)}" if options else ""
    packages = tuple(getattr(backend, "PACKAGES", ()))
    return verdicts.Subject(name, check, told, device, packages)


def check(told: dict[str, Any]) -> str | None:
    """Do what ``subject`` tells: what is wrong with a family, or None."""
    device, dims = torch.device(told["device"]), told["dims"]
    begin(device)
    options: dict[str, Any] = dict.fromkeys(told["options"], True)
    traits = Traits(
        device_type=device.type,
        dtype=getattr(torch, told["dtype"]),
        head_dim=dims[0],
        value_head_dim=dims[1],
        softmax_scale=dims[0] ** -0.5,
        device=device,
        **options,
    )
    family = _family(told)
    with nullcontext() if told["variant"] is None else family.only_variant():
        return _self_check.wrong_with(family, traits, device)


def _module(backend: Any) -> str | None:
    """Where another process finds a family, where that is a module."""
    return backend.__name__ if isinstance(backend, ModuleType) else None


def _family(told: dict[str, Any]) -> Any:
    if told["module"] is not None:
        return importlib.import_module(told["module"])
    return next(backend for backend in _table() if told["family"] == backend.NAME)


def _table() -> Sequence[Any]:
    table: Sequence[Any] = importlib.import_module("usp.backends").TABLE
    return table


def _device(traits: Traits) -> torch.device:
    return traits.device or torch.device(traits.device_type)
