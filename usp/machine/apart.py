"""Work in a process of its own: what hangs or crashes there leaves this one alone.

A GPU that has faulted is lost to its process, so whoever may fault is tried elsewhere first.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

_MARK = "usp, apart: "
_BEGAN, _ANSWER = f"{_MARK}began", f"{_MARK}answer "
_STARTING = 120.0  # seconds: Python, torch, and a device that others use too
_is_apart = False


class Watched(NamedTuple):
    """What a process said, and why it says no more."""

    said: str
    reason: str


class Ended(NamedTuple):
    """What became of tasks: whether they had the device, answers of the first ones, and why there
    are no more."""

    began: bool
    answers: list[Any]
    reason: str


class Last(Exception):
    """A task's answer, after which its process is not fit for others."""


def command_of(code: str, *arguments: str) -> list[str]:
    """A process that runs some code, which finds ``sys`` and what this process imports."""
    # with -c Python looks in its folder first, where other sources of usp may lie
    own = "import sys; sys.path = [folder for folder in sys.path if folder]; "
    return [sys.executable, "-c", own + code, *arguments]


def watch(
    command: Sequence[str], mark: str, patience: float, first: float | None = None
) -> Watched:
    """Run a command to its end, or until it has made no mark for so many seconds.

    Args:
        mark: What it prints from time to time.
        first: Seconds until the first mark, where that takes another time.
    """
    with tempfile.TemporaryDirectory(prefix="usp-apart-") as folder:
        output, errors = Path(folder, "out"), Path(folder, "err")
        # what it imports is what this process imports: "" is the folder that it runs in
        paths = (path or os.getcwd() for path in sys.path)
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        with output.open("w") as out, errors.open("w") as err:
            child = subprocess.Popen(command, stdout=out, stderr=err, env=environ)
        try:
            allowed = _waited(child, output, mark, patience, first)
            reason = f"still running after {allowed:.0f} s"
            if child.poll() is not None:
                last = errors.read_text(errors="replace").strip().splitlines()[-1:]
                reason = f"exit code {child.returncode}: {''.join(last)}"
        finally:
            child.kill()
            child.wait()
        return Watched(output.read_text(errors="replace"), reason)


def _waited(
    child: subprocess.Popen[bytes],
    output: Path,
    mark: str,
    patience: float,
    first: float | None,
) -> float:
    """Until a process ends or is too slow: how many seconds it was allowed last."""
    marks, allowed = 0, patience if first is None else first
    deadline = time.monotonic() + allowed
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        now = output.read_text(errors="replace").count(mark)
        if now > marks:
            marks, allowed = now, patience
            deadline = time.monotonic() + allowed
    return allowed


def run_apart(task: str, arguments: Sequence[Any], patience: float) -> Ended:
    """Call a function in a new process, once for each argument.

    Args:
        task: "module:function"; it takes an argument, calls ``begin`` once it has the device, and
            returns what JSON can hold, or raises it as ``Last``.
        arguments: What JSON can hold.
        patience: Seconds for each, from when the first has the device.
    """
    code = "from usp.machine import apart; apart.answer(*sys.argv[1:])"
    command = command_of(code, task, json.dumps(list(arguments)))
    try:
        said, reason = watch(command, _MARK, patience, _STARTING)
    except OSError as error:
        return Ended(False, [], str(error))
    answers = [line for line in said.splitlines() if line.startswith(_ANSWER)]
    found = [json.loads(line.removeprefix(_ANSWER)) for line in answers]
    return Ended(_MARK in said, found, reason)


def begin(device: torch.device) -> None:
    """A task takes its device, and says so where it is apart."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
    if _is_apart:
        print(f"\n{_BEGAN}", flush=True)


def answer(task: str, arguments: str) -> None:
    """In the new process, which checks nothing but what it was sent for."""
    global _is_apart
    _is_apart, os.environ["USP_SELF_CHECK"] = True, "0"
    module, _, name = task.partition(":")
    function = getattr(importlib.import_module(module), name)
    for argument in json.loads(arguments):
        try:
            found, is_last = function(argument), False
        except Last as last:
            found, is_last = last.args[0], True
        print(f"\n{_ANSWER}{json.dumps(found)}", flush=True)
        if is_last:
            return
