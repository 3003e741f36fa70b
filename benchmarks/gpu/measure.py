"""Times of the GPU benchmark, as its reports hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gpu.guard import Guard
from usp.bench import device
from usp.bench.device import Run
from usp.bench.timing import Times


@dataclass(frozen=True)
class Settings(device.Settings):
    """How to measure, and the ``guard`` by which candidates are tried."""

    guard: Guard | None = None

    @property
    def tried(self) -> Any:
        assert self.guard is not None
        return self.guard.tried


def timed(runs: dict[str, Run], settings: Settings) -> dict[str, Any]:
    """Seconds of one call of each candidate, taken in turn, and which clock they were taken by."""
    times, clock = device.measured(runs, settings)
    return {**_summary(times), "clock": clock if settings.on_gpu else "eager"}


def timed_eagerly(runs: dict[str, Run], settings: Settings) -> dict[str, Any]:
    """The same with what launching costs."""
    return _summary(device.measured_eagerly(runs, settings))


def _summary(times: Times) -> dict[str, Any]:
    return {
        "seconds": {name: times.median(name) for name in times.seconds},
        "rounds": times.seconds,
    }


def ratio(result: dict[str, Any], over: str, under: str) -> float:
    """Median over rounds of time(over) / time(under)."""
    return Times(result["rounds"]).ratio(over, under)


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
