"""Kernels that move and merge, and those of linear attention, show on a GPU that they are right
before they are used there.

Nobody has measured who merges and packs fastest, and no committed result covers any of them. On a
CPU they are one source, whatever the machine.
"""

from __future__ import annotations

import warnings

import torch

from usp.machine import verdicts

_found: dict[tuple[str, str, torch.device, tuple[str, ...]], bool] = {}


def may_run(
    op: str,
    name: str,
    task: verdicts.Task,
    device: torch.device,
    about: tuple[str, ...] = (),
) -> bool:
    """Whether kernels are right on a device, as far as anybody asks.

    Args:
        op: What they do.
        name: Whose they are.
        task: Says what is wrong with those of a name on a device, given ``[name, str(device),
            *about]``.
        about: What else the verdict holds for alone.
    """
    if not _is_asked_of(device):
        return True
    key = op, name, device, about
    if key not in _found:
        if not verdicts.are_asked_for() or verdicts.must_wait(device):
            return True
        title, told = " ".join([f"{op} by {name}", *about]), [name, str(device), *about]
        subject = verdicts.Subject(title, task, told, device, ("triton",))
        wrong = verdicts.wrong_with(subject, apart=_in_own_process(device))
        _found[key] = wrong is None
        if wrong is not None:
            message = f"{op} by {name!r} is left out here: {wrong}. The next that can does it"
            warnings.warn(f"{message} instead. ({verdicts.advice()})", stacklevel=4)
    return _found[key]


def forget() -> None:
    """Ask anew what this process has asked."""
    _found.clear()


def _is_asked_of(device: torch.device) -> bool:
    return device.type != "cpu"


def _in_own_process(device: torch.device) -> bool:
    """Whether a fault would cost this process its device."""
    return device.type != "cpu"
