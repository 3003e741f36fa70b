"""Starts processes of this machine, listens to them, and ends them all when one fails."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

# What a process does: (settings, rank, tell) -> its result; what it tells the caller hears at once.
Work = Callable[..., Any]
Tell = Callable[..., None]


class ProcessFailed(Exception):
    """A process raised, died or did not answer; `details` is its traceback."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


@dataclass
class _Process:
    handle: Any
    pipe: Connection
    rank: int


def run(
    work: Work, settings: Any, count: int, tell: Tell, seconds: float | None = None
) -> list[Any]:
    """`work(settings, rank, tell)` in `count` fresh processes: their results by rank.

    Fresh means forked from a process that has imported torch and run nothing: each has its own
    threads and peak memory. What rank 0 tells goes to `tell`.

    Args:
        seconds: How long they may take together; None is any time.

    Raises:
        ProcessFailed: one raised, died or took too long; the others have been ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    processes = []
    try:
        for rank in range(count):
            ours, theirs = context.Pipe(duplex=False)
            handle = context.Process(target=_child, args=(work, settings, rank, theirs))
            handle.start()
            theirs.close()
            processes.append(_Process(handle, ours, rank))
        return _listen(processes, tell, seconds)
    finally:
        for process in processes:
            if process.handle.is_alive():
                process.handle.terminate()
            process.handle.join()
            process.pipe.close()


def _child(work: Work, settings: Any, rank: int, pipe: Connection) -> None:
    def tell(*news: Any) -> None:
        if rank == 0:
            pipe.send(("progress", news))

    try:
        answer = ("result", work(settings, rank, tell))
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        answer = ("failed", (message, traceback.format_exc()))
    pipe.send(answer)


def _listen(processes: list[_Process], tell: Tell, seconds: float | None) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {process.pipe: process for process in processes}
    end = None if seconds is None else time.monotonic() + seconds
    while waiting:
        ready = wait(list(waiting), None if end is None else max(0.0, end - time.monotonic()))
        if not ready:
            late = sorted(process.rank for process in waiting.values())
            raise ProcessFailed(
                f"processes {late} of {len(processes)} gave no answer in {seconds:g} s"
            )
        for pipe in ready:
            process = waiting[pipe]  # type: ignore[index]
            try:
                kind, content = process.pipe.recv()
            except EOFError:
                process.handle.join()
                raise ProcessFailed(
                    f"process {process.rank} of {len(processes)} ended with exit code "
                    f"{process.handle.exitcode} and no result (out of memory?)"
                ) from None
            if kind == "progress":
                tell(*content)
            elif kind == "failed":
                message, details = content
                raise ProcessFailed(
                    f"process {process.rank} of {len(processes)} failed: {message}", details
                )
            else:
                results[process.rank] = content
                del waiting[process.pipe]
    return [results[process.rank] for process in processes]
