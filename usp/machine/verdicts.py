"""Whether kernels are right on this machine: found out once, and kept for later processes.

Who asks says how to find out (``Subject.task``); nothing here knows what a kernel is.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from usp.machine import kept
from usp.machine.apart import run_apart
from usp.machine.place import place

Task = Callable[[Any], "str | None"]
PATIENCE = 120.0  # seconds: a family of kernels may have to be compiled


@dataclass(frozen=True, eq=False)
class Subject:
    """What is to be found right or wrong.

    Attributes:
        name: Says all that the verdict holds for, beside the place.
        task: Takes ``argument``, says what is wrong or None; a function of a module, so that
            another process can call it. It may raise, fault or hang.
        argument: What JSON can hold.
        device: Where.
        packages: Distributions whose versions matter.
    """

    name: str
    task: Task
    argument: Any
    device: torch.device
    packages: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.name}; {place(self.device, self.packages)}"

    @property
    def order(self) -> dict[str, Any]:
        """What another process is told."""
        task = f"{self.task.__module__}:{self.task.__name__}"
        return {"task": task, "argument": self.argument}


def are_asked_for() -> bool:
    """Whether kernels are checked at all: ``USP_SELF_CHECK=0`` says no."""
    return os.environ.get("USP_SELF_CHECK", "1").lower() not in ("0", "no", "off", "false")


def must_wait(device: torch.device) -> bool:
    """While a graph is made or recorded nothing else may run; whoever asks then asks again."""
    if torch.compiler.is_compiling() or torch._guards.detect_fake_mode() is not None:
        return True
    if device.type != "cuda":
        return False
    return not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing()


def advice() -> str:
    """What a user can do about a verdict."""
    return f"`usp tune` checks again; {store()} keeps it; USP_SELF_CHECK=0 asks nobody"


def store() -> Path:
    """The file."""
    return kept.folder() / "usp-verdicts.json"


_lock = threading.Lock()
_found_here: dict[str, str | None] = {}


def wrong_with(subject: Subject, *, apart: bool, again: bool = False) -> str | None:
    """What was seen to be wrong with a subject, or None where it is right.

    Args:
        apart: Find out in a process of its own, as a GPU wants it; where none can use the device,
            and otherwise, in a thread, which shares no mode of torch with the caller.
        again: Do not trust what was found before.
    """
    path, key = store(), subject.key
    with _lock:
        if key in _found_here and not again:
            return _found_here[key]
        with kept.one_at_a_time(path):
            before = kept.read(path).get(key)
            if not again and isinstance(before, dict) and "wrong" in before:
                found = before["wrong"]
            else:
                found, lasts = _find_out(subject, apart)
                if lasts:
                    _keep(path, key, found)
        _found_here[key] = found
        return found


def kept_of(device: torch.device) -> dict[str, str | None]:
    """What was found out on a device, with this driver and these versions: by subject, what is
    wrong or None."""
    found = {}
    for key, verdict in kept.read(store()).items():
        name, _, where = key.partition("; ")
        if where.startswith(place(device)) and isinstance(verdict, dict) and "wrong" in verdict:
            found[name] = verdict["wrong"]
    return found


def forget() -> None:
    """What this process has found out; what is in the file stays."""
    with _lock:
        _found_here.clear()


def _keep(path: Path, key: str, found: str | None) -> None:
    with suppress(OSError):  # then later processes find out by themselves
        kept.add(path, {key: {"wrong": found}})


def _find_out(subject: Subject, apart: bool) -> tuple[str | None, bool]:
    """What is wrong, and whether that is known for good."""
    if apart:
        ended = run_apart(f"{__name__}:judge", subject.order, PATIENCE)
        if ended.answer is not None and ended.answer["lasts"]:
            return ended.answer["wrong"], True
        if ended.began and ended.answer is None:
            # who was killed from outside may be right
            reason = f"its process ended without an answer ({ended.reason})"
            return reason, not ended.reason.startswith("exit code -9")
    return _in_a_thread(subject)


def judge(order: dict[str, Any]) -> dict[str, Any]:
    """Do the task of a subject, as ``Subject.order`` tells it to another process."""
    module, _, function = order["task"].partition(":")
    return _judged(getattr(importlib.import_module(module), function), order["argument"])


def _judged(task: Task, argument: Any) -> dict[str, Any]:
    """What is wrong, and whether it lasts: memory that is full now may be free later."""
    try:
        return {"wrong": task(argument), "lasts": True}
    except Exception as error:
        lines = str(error).strip().splitlines()
        told = f"it raised {type(error).__name__}: {lines[0] if lines else ''}"
        return {"wrong": told[:300], "lasts": not isinstance(error, torch.OutOfMemoryError)}


def _in_a_thread(subject: Subject) -> tuple[str | None, bool]:
    found: dict[str, Any] = {}
    thread = threading.Thread(
        target=lambda: found.update(_judged(subject.task, subject.argument)), name="usp self-check"
    )
    thread.start()
    thread.join()
    return found["wrong"], found["lasts"]
