"""Times on a GPU: calls recorded once as a graph and replayed, so that launching does not count."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _gpu_guard import Guard, said
from _measure import Times, take_turns

Run = Callable[[], Any]
GRAPH_CALLS = 4  # of one graph
AT_LEAST = 5e-3  # seconds between two looks at the clock


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        rounds: Of each case at most, and at least 3.
        seconds: After which a case gets no further round.
        guard: By which candidates are tried.
    """

    device: str
    rounds: int
    seconds: float
    guard: Guard

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


def now(settings: Settings) -> float:
    if settings.on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(runs: dict[str, Run], settings: Settings) -> dict[str, Any]:
    """Seconds of one call of each candidate, taken in turn, and which clock they were taken by.

    "graph" is the device's time alone. Where one of them cannot be recorded, none is, and the
    clock is "eager": with what launching costs where that is longer.
    """
    graphs, reasons = _recorded(runs) if settings.on_gpu else ({}, {})
    if reasons or not settings.on_gpu:
        found = timed_eagerly(runs, settings)
        return {**found, "clock": "eager", **({"not_recorded": reasons} if reasons else {})}
    found = timed_eagerly({name: graph.replay for name, graph in graphs.items()}, settings)
    seconds = {n: [s / GRAPH_CALLS for s in taken] for n, taken in found["rounds"].items()}
    for graph in graphs.values():
        graph.reset()
    return {**_summary(Times(seconds)), "clock": "graph"}


def timed_eagerly(runs: dict[str, Run], settings: Settings) -> dict[str, Any]:
    """The same by calling them; several calls to a look at the clock where they are short."""
    many = {name: _repeated(run, settings) for name, run in runs.items()}

    def seconds(run: Run) -> float:
        start = now(settings)
        run()
        return now(settings) - start

    calls = {name: run for name, (run, _) in many.items()}
    times = take_turns(calls, settings.rounds, settings.seconds, seconds)
    single = {n: [s / many[n][1] for s in taken] for n, taken in times.seconds.items()}
    return _summary(Times(single))


def _summary(times: Times) -> dict[str, Any]:
    return {
        "seconds": {name: times.median(name) for name in times.seconds},
        "rounds": times.seconds,
    }


def ratio(result: dict[str, Any], over: str, under: str) -> float:
    """Median over rounds of time(over) / time(under)."""
    return Times(result["rounds"]).ratio(over, under)


def _repeated(run: Run, settings: Settings) -> tuple[Run, int]:
    """As many calls as take long enough to be timed, and their number."""
    if not settings.on_gpu:
        return run, 1
    run()
    start = now(settings)
    run()
    count = max(1, min(200, int(AT_LEAST / max(now(settings) - start, 1e-6))))

    def many() -> None:
        for _ in range(count):
            run()

    return many, count


def _recorded(runs: dict[str, Run]) -> tuple[dict[str, Any], dict[str, str]]:
    """A CUDA graph of calls of each candidate; reasons where there can be none."""
    graphs, reasons = {}, {}
    for name, run in runs.items():
        for _ in range(2):  # compile, plan, copy spans: none of it can be recorded
            run()
        graphs[name] = graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                for _ in range(GRAPH_CALLS):
                    run()
        except Exception as error:  # whatever a library may not do while it is recorded
            reasons[name] = said(error)
            torch.cuda.synchronize()
    return graphs, reasons


def peak_memory(run: Run, settings: Settings) -> int:
    """Bytes allocated beyond what was there; 0 on CPU, where nobody counts them."""
    if not settings.on_gpu:
        run()
        return 0
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def matrix_tflops(dtype: torch.dtype, settings: Settings) -> float:
    """Of torch's own matrix product."""
    size = 8192 if settings.on_gpu else 256
    a, b = (torch.randn(size, size, device=settings.device).to(dtype) for _ in range(2))
    found = timed({"product": lambda: a @ b}, settings)
    return 2.0 * size**3 / found["seconds"]["product"] / 1e12


def copy_bandwidth(settings: Settings) -> float:
    """Bytes per second of a copy within the device's memory, read and written both counted."""
    size = 2**30 if settings.on_gpu else 2**20
    source, target = (torch.ones(size, dtype=torch.uint8, device=settings.device) for _ in range(2))
    found = timed({"copy": lambda: target.copy_(source)}, settings)
    return 2.0 * size / found["seconds"]["copy"]
