"""Whether kernels are right on this machine: found out once, and kept for later processes.

Who asks says how to find out (``Subject.task``); nothing here knows what a kernel is.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from usp.machine import kept
from usp.machine.apart import Last, run_apart
from usp.machine.place import place

Task = Callable[[Any], "str | None"]
# what is wrong or None, whether that is known for good, and whether the task raised it
Verdict = dict[str, Any]
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


def wrong_with(subject: Subject, *, apart: bool) -> str | None:
    """What was seen to be wrong with a subject, or None where it is right.

    Args:
        apart: Find out in a process of its own, as a GPU wants it; where none can use the device,
            and otherwise, in a thread, which shares no mode of torch with the caller.
    """
    path, key = store(), subject.key
    with _lock:
        if key in _found_here:
            return _found_here[key]
        with kept.one_at_a_time(path):
            before = kept.read(path).get(key)
            if isinstance(before, dict) and "wrong" in before:
                found = _found_here[key] = before["wrong"]
                return found
            (found,) = _find_out_and_keep([subject], apart)
            return found


def find_out(subjects: Sequence[Subject], *, apart: bool) -> list[str | None]:
    """``wrong_with`` of several, whatever was found before: they share a process as they can."""
    with _lock, kept.one_at_a_time(store()):
        return _find_out_and_keep(subjects, apart)


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


def _find_out_and_keep(subjects: Sequence[Subject], apart: bool) -> list[str | None]:
    found = _found_apart(subjects) if apart else []
    found += [_in_a_thread(subject) for subject in subjects[len(found) :]]
    for subject, verdict in zip(subjects, found, strict=True):
        _found_here[subject.key] = verdict["wrong"]
        if verdict["lasts"]:
            with suppress(OSError):  # then later processes find out by themselves
                kept.add(store(), {subject.key: {"wrong": verdict["wrong"]}})
    return [verdict["wrong"] for verdict in found]


def _found_apart(subjects: Sequence[Subject]) -> list[Verdict]:
    """Of as many as can be found out in other processes: of all, or up to where none began."""
    found: list[Verdict] = []
    while len(found) < len(subjects):
        left = subjects[len(found) :]
        ended = run_apart(f"{__name__}:judge_apart", [x.order for x in left], PATIENCE)
        if not ended.began:
            break
        found += ended.answers
        if len(ended.answers) == len(left) or (ended.answers and ended.answers[-1]["raised"]):
            continue
        # whose turn it was has ended the process; who was killed from outside may be right
        reason = f"its process ended without an answer ({ended.reason})"
        found.append(_verdict(reason, lasts=not ended.reason.startswith("exit code -9")))
    return [
        # memory that is full with two processes may do for one
        _in_a_thread(subject) if not verdict["lasts"] and verdict["raised"] else verdict
        for subject, verdict in zip(subjects, found, strict=False)
    ]


def _verdict(wrong: str | None, *, lasts: bool = True, raised: bool = False) -> Verdict:
    return {"wrong": wrong, "lasts": lasts, "raised": raised}


def judge_apart(order: dict[str, Any]) -> Verdict:
    """Do the task of a subject in another process, as ``Subject.order`` tells it."""
    module, _, function = order["task"].partition(":")
    found = _judged(getattr(importlib.import_module(module), function), order["argument"])
    if found["raised"]:  # a device that has faulted fails whoever comes next
        raise Last(found)
    return found


def _judged(task: Task, argument: Any) -> Verdict:
    """What is wrong, and whether it lasts: memory that is full now may be free later."""
    try:
        return _verdict(task(argument))
    except Exception as error:
        lines = str(error).strip().splitlines()
        told = f"it raised {type(error).__name__}: {lines[0] if lines else ''}"
        lasts = not isinstance(error, torch.OutOfMemoryError)
        return _verdict(told[:300], lasts=lasts, raised=True)


def _in_a_thread(subject: Subject) -> Verdict:
    found: list[Verdict] = []

    def call() -> None:
        # many small products: on a busy machine each would wait long for a second core
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            found.append(_judged(subject.task, subject.argument))
        finally:
            torch.set_num_threads(threads)

    thread = threading.Thread(target=call, name="usp self-check")
    thread.start()
    thread.join()
    return found[0]
