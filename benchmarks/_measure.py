"""Timing that stands noise: candidates in turn, ratios inside one round, medians of rounds."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from usp.backends import native
from usp.machine import cpu

MATMUL_SIZE = 1024
# Time waiting for a core counts on a wall clock only; time spinning for another thread on both.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Times:
    """Seconds of each candidate in each round; round i of all was taken within one stretch."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, over: str, under: str) -> float:
        """Median over rounds of time(over) / time(under)."""
        pairs = zip(self.seconds[over], self.seconds[under], strict=True)
        return statistics.median(a / b for a, b in pairs)


def interleave(
    candidates: dict[str, Callable[[], object]], rounds: int, budget: float, clock: str = "wall"
) -> Times:
    """Time candidates in turn, in both orders, after one call of each that does not count.

    Args:
        rounds: At most so many; at least 3.
        budget: Seconds after which no further round begins.
        clock: One of CLOCKS.
    """
    now = CLOCKS[clock]

    def seconds(run: Callable[[], object]) -> float:
        start = now()
        run()
        return now() - start

    return take_turns(candidates, rounds, budget, seconds)


def take_turns(
    candidates: dict[str, Callable[[], object]],
    rounds: int,
    budget: float,
    seconds: Callable[[Callable[[], object]], float],
    agree: Callable[[bool], bool] = bool,
) -> Times:
    """Like ``interleave``, with one's own way to time a call.

    Args:
        seconds: What a call took.
        agree: Of several processes that take turns together: what the first of them says.
    """
    for run in candidates.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for index in range(rounds):
        if index >= 3 and agree(time.perf_counter() - begin > budget):
            break
        order = list(candidates)
        for name in order if index % 2 == 0 else reversed(order):
            taken[name].append(seconds(candidates[name]))
    return Times(taken)


def refuse_inexact(case: object, errors: Mapping[str, Mapping[str, float]], allowed: float) -> None:
    """End where a scheme's result is further from the exact one than it may be, or is NaN.

    Args:
        errors: Of each scheme, of each of its results.
    """
    for scheme, found in errors.items():
        for tensor, error in found.items():
            if not error <= allowed:
                raise ValueError(
                    f"{case}: {tensor} of {scheme} is off by {error:.2e}, more than "
                    f"{allowed:.0e}: not timed"
                )


def matmul(dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """torch's matrix product as the measure of the machine: the call, and its FLOPs."""
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * MATMUL_SIZE**3


def introduce(**more: Any) -> dict[str, Any]:
    """The environment, printed; ends the program where the kernels to be measured are missing."""
    missing = native.unavailable()
    if missing is not None:
        sys.exit(f"nothing to measure: {missing}")
    about = {**environment(), "cpu_capability": cpu.level(), **more}
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    return about


def write_report(file: Path | None, about: dict[str, Any], **results: Any) -> None:
    """``results`` under what ``introduce`` gave, as JSON."""
    if file is not None:
        about = {**about, "load_average_after": os.getloadavg()}
        file.write_text(json.dumps({"environment": about, **results}, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Where and when a result was measured."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "cpu": cpu.model(),
        "cpu_vendor": cpu.vendor(),
        "cpu_capability_of_torch": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
