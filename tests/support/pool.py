"""A pool of gloo workers that lives as long as the pytest session.

Workers are forked from a template process (multiprocessing's fork server) that has imported torch,
usp and what most tests need, and run nothing with it, so a fork costs milliseconds, inherits no
thread, and workers that hung or crashed are replaced by fresh ones as cheaply as the first. Each
worker has one thread, fresh memory filled with NaN, and its stderr in a file of its own.

In a test: ``results = pool.run(function, *args, ranks=4)``; ``function`` lives in a module of
tests/ and runs on the 4 workers of a world of 4, where ``pool.mesh(2, 2)`` is their mesh.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import gc
import importlib
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from places import TESTS

WORKERS = 6
# Less than pytest's own limit, which names no rank. Not shorter for short tests: where every graph
# is compiled anew on a machine that does other things, they take ten times as long.
PATIENCE_S = 280.0
# how long the others may take to return once one rank has failed: they often wait for it in vain
GRACE_SECONDS = 5.0
# what most workers would import: the first optimizer of a process imports Dynamo, the first graph
# inductor (0.9 s), whose settings use_deterministic_algorithms reads; test modules import the rest
PRELOADED = ["template", "torch", "torch._dynamo", "torch._inductor.compile_fx"]
PRELOADED += ["pytest", "hypothesis", "usp", "judge", "training_case"]
SKIPPED = pytest.skip.Exception.__name__
# an orderly refusal leaves nothing in flight, so the workers can be kept
REFUSALS = {"ValueError", "TypeError", "NotImplementedError", SKIPPED}


class RemoteError(Exception):
    """What went wrong on one rank: an exception there, a hang, or its death."""

    def __init__(self, rank: int, kind: str, message: str, details: str) -> None:
        super().__init__(f"rank {rank}: {kind}: {message}\n{details}")
        self.rank, self.kind, self.message, self.details = rank, kind, message, details

    @property
    def is_consequence(self) -> bool:
        """Whether another rank's failure may be the cause: waiting for it, or losing it."""
        return self.kind == "Hang" or "by peer" in self.message


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    log: Path

    def log_tail(self, start: int, lines: int = 60) -> str:
        with self.log.open("rb") as file:
            file.seek(start)
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])

    def signal(self, number: int) -> None:
        """A worker that has died hears nothing."""
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Pool:
    """Worlds of 1 to ``size`` ranks, each with its own workers, started when first asked for.

    Args:
        size: At most so many ranks.
        setup: Called by each worker first; lives in a module of this folder.
    """

    def __init__(self, size: int = WORKERS, setup: Callable[[], None] | None = None) -> None:
        self.size = size
        self._setup = None if setup is None else _reference(setup)
        self.starts = 0
        self._worlds: dict[int, list[_Worker]] = {}
        self._awake = 0  # ranks of the world that was used last
        self._folder = tempfile.TemporaryDirectory(prefix="pool-")
        self._context = multiprocessing.get_context("forkserver")

    def prepare(self, *more: str) -> None:
        """Starts the template process, which imports torch, and more where it is told so first."""
        self._context.set_forkserver_preload([*PRELOADED, *more])
        path = os.pathsep.join(folder for folder in sys.path if folder)
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path):
            forkserver.ensure_running()

    def run(
        self, function: Callable[..., Any], *args: Any, ranks: int, timeout: float = PATIENCE_S
    ) -> list[Any]:
        """Calls ``function(*args)`` on each rank of a world of ``ranks``: its results, by rank.

        Raises:
            RemoteError: the first rank that went wrong by itself, not by waiting for another.
            pytest.skip.Exception: that rank skips, for want of a library that it imports.
        """
        outcomes = self.outcomes(function, *args, ranks=ranks, timeout=timeout)
        errors = [outcome for outcome in outcomes if isinstance(outcome, RemoteError)]
        if errors:
            first = min(errors, key=lambda error: (error.is_consequence, error.rank))
            if first.kind == SKIPPED:
                pytest.skip(first.message)
            raise first
        return outcomes

    def outcomes(
        self, function: Callable[..., Any], *args: Any, ranks: int, timeout: float = PATIENCE_S
    ) -> list[Any]:
        """Like :meth:`run`, with a :class:`RemoteError` in the place of each rank that failed."""
        request = pickle.dumps((_reference(function), args))
        workers = self._world(ranks)
        log_starts = [worker.log.stat().st_size for worker in workers]
        for worker in workers:
            worker.pipe.send_bytes(request)
        outcomes = _collect(workers, log_starts, timeout)
        kinds = {outcome.kind if isinstance(outcome, RemoteError) else "" for outcome in outcomes}
        if kinds != {""} and not (len(kinds) == 1 and kinds <= REFUSALS):
            self._end(ranks)
        return outcomes

    def close(self) -> None:
        for ranks in list(self._worlds):
            self._end(ranks)

    def _end(self, ranks: int) -> None:
        for worker in self._worlds.pop(ranks):
            worker.end()

    def _world(self, ranks: int) -> list[_Worker]:
        if not 1 <= ranks <= self.size:
            raise ValueError(f"ranks must be 1 to {self.size}, got {ranks}")
        if ranks != self._awake:
            # gloo's threads wake a hundred times a second: worlds that wait cost a tenth of a core
            self._signal(self._awake, signal.SIGSTOP)
            self._signal(ranks, signal.SIGCONT)
            self._awake = ranks
        if ranks not in self._worlds:
            self.prepare()
            self.starts += 1
            self._worlds[ranks] = [self._start_worker(rank, ranks) for rank in range(ranks)]
            for outcome in _collect(self._worlds[ranks], [0] * ranks, PATIENCE_S):
                if isinstance(outcome, RemoteError):
                    self._end(ranks)
                    raise outcome
        return self._worlds[ranks]

    def _signal(self, ranks: int, number: int) -> None:
        for worker in self._worlds.get(ranks, ()):
            worker.signal(number)

    def _start_worker(self, rank: int, ranks: int) -> _Worker:
        store = os.path.join(self._folder.name, f"store-{self.starts}")
        log = Path(self._folder.name) / f"{self.starts}-rank-{rank}.log"
        log.touch()
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(rank, ranks, store, theirs, str(log), self._setup), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process, ours, log)


def _collect(workers: list[_Worker], log_starts: list[int], timeout: float) -> list[Any]:
    """One outcome of each worker; those that do not answer in time are described, not ended."""
    outcomes: dict[int, Any] = {}
    began = time.monotonic()
    deadline = began + timeout
    while len(outcomes) < len(workers):
        pipes = {w.pipe: rank for rank, w in enumerate(workers) if rank not in outcomes}
        ready = wait(list(pipes), max(0.0, deadline - time.monotonic()))
        for pipe in ready:
            rank = pipes[pipe]
            outcomes[rank] = _receive(rank, workers[rank], log_starts[rank])
            if isinstance(outcomes[rank], RemoteError):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if not ready:
            seconds = time.monotonic() - began
            outcomes |= _describe_hang(workers, list(pipes.values()), log_starts, seconds)
    return [outcomes[rank] for rank in range(len(workers))]


def _describe_hang(
    workers: list[_Worker], hanging: list[int], log_starts: list[int], seconds: float
) -> dict[int, RemoteError]:
    for rank in hanging:
        os.kill(workers[rank].process.pid, signal.SIGUSR1)
    time.sleep(0.3)
    message = f"no answer after {seconds:.1f} s (hanging: ranks {hanging})"
    return {
        rank: RemoteError(rank, "Hang", message, workers[rank].log_tail(log_starts[rank]))
        for rank in hanging
    }


def _reference(function: Callable[..., Any]) -> tuple[str, str]:
    """A name that the workers can import: modules of this folder go by their file's name."""
    if "<" in function.__qualname__:
        raise ValueError(f"workers cannot import {function.__qualname__}: define it in a module")
    file = Path(inspect.getfile(function)).resolve()
    module = file.stem if TESTS in file.parents else function.__module__
    return module, function.__qualname__


def _function(module: str, name: str) -> Callable[..., Any]:
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


def _receive(rank: int, worker: _Worker, log_start: int) -> Any:
    try:
        failed, answer = pickle.loads(worker.pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        worker.process.join(5)
        message = f"the worker ended with exit code {worker.process.exitcode}"
        return RemoteError(rank, "Died", message, worker.log_tail(log_start))
    return RemoteError(rank, *answer) if failed else answer


def _work(
    rank: int, ranks: int, store: str, pipe: Connection, log: str, setup: tuple[str, str] | None
) -> None:
    """A worker's life: join the process group, then answer requests until the parent is gone."""
    # what was imported stays: walking through it is a tenth of a short test's time
    gc.freeze()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # one that sleeps does not see that the parent is gone
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if setup is not None:
        _function(*setup)()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=5),
    )
    pipe.send_bytes(pickle.dumps((False, None)))
    while True:
        try:
            (module, name), args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        pipe.send_bytes(_answer(module, name, args))


def _answer(module: str, name: str, args: tuple[Any, ...]) -> bytes:
    try:
        torch.manual_seed(0)
        if "torch._dynamo" in sys.modules:  # what others compiled here counts against its limits
            torch._dynamo.reset()
        return pickle.dumps((False, _function(module, name)(*args)))
    except (Exception, pytest.skip.Exception) as error:
        answer = type(error).__name__, str(error), traceback.format_exc()
        return pickle.dumps((True, answer))


@functools.cache
def mesh(ulysses_degree: int, ring_degree: int, ring_outer_degree: int = 1) -> Any:
    """On a worker: the mesh over its world, made once."""
    import usp

    return usp.init_mesh(
        ulysses_degree, ring_degree, ring_outer_degree=ring_outer_degree, device_type="cpu"
    )
