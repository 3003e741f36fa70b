"""Long commands that run beside the tests, which leave a core idle most of the time.

They start, one behind the other, once it is known that a test which asks for them was collected.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

SECONDS = 1500  # of one command


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Background:
    """Commands by the name of the fixture that waits for them.

    Attributes:
        modules: In the order in which they run; ``command()`` of each gives the command and its
            environment.
    """

    modules: dict[str, str]
    _futures: dict[str, Future[Said]] = field(default_factory=dict)
    _running: set[subprocess.Popen[str]] = field(default_factory=set)
    _over: threading.Event = field(default_factory=threading.Event)

    def start(self, wanted: set[str]) -> None:
        """Those of the commands that are wanted."""
        one_by_one = ThreadPoolExecutor(1)
        for name in self.modules:
            if name in wanted:
                self._futures[name] = one_by_one.submit(self._run, name)
        one_by_one.shutdown(wait=False)

    def result(self, name: str) -> Said:
        return self._futures[name].result()

    def stop(self) -> None:
        """End what still runs, and begin nothing more."""
        self._over.set()
        for process in list(self._running):
            _end(process)

    def _run(self, name: str) -> Said:
        command, environment = sys.modules[self.modules[name]].command()
        if self._over.is_set():
            return Said(-1, "", "the session is over")
        process = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._running.add(process)
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            _end(process)
            out, err = process.communicate()
        self._running.discard(process)
        return Said(process.returncode, out, err)


def _end(process: subprocess.Popen[str]) -> None:
    """With all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def environment(**more: str) -> dict[str, str]:
    """Of a command: usp from where it came from here, and one thread."""
    paths = os.pathsep.join(folder for folder in sys.path if folder)
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}
