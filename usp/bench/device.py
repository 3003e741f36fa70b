"""Times on the device at hand, a CPU or a GPU, and what it can do at most.

On a GPU calls are recorded once as a graph and replayed, so that launching does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from usp.bench.timing import CLOCKS, Times, take_turns

Run = Callable[[], Any]
GRAPH_CALLS = 4  # of one graph
MOST_CALLS = 200  # between two looks at the clock
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: "cuda" (also of AMD) or "cpu".
        rounds: Of each case at most, and at least 3.
        seconds: After which a case gets no further round.
        clock: One of ``timing.CLOCKS``; on a GPU the wall's.
        at_least: Seconds between two looks at the clock: short calls are repeated.
    """

    device: str
    rounds: int
    seconds: float
    clock: str = "wall"
    at_least: float = 5e-3

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


def default_device() -> str:
    """ "cuda" where torch sees a GPU, of NVIDIA or AMD, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def now(settings: Settings) -> float:
    if settings.on_gpu:
        torch.cuda.synchronize()
        return time.perf_counter()
    return CLOCKS[settings.clock]()


def measured(runs: Mapping[str, Run], settings: Settings) -> tuple[Times, str]:
    """Seconds of one call of each candidate, taken in turn, and which clock they were taken by.

    "graph" is the device's time alone. Where one of them cannot be recorded, none is, and the
    clock is "eager": with what launching costs where that is longer.
    """
    graphs, reasons = recorded(runs) if settings.on_gpu else ({}, {})
    if reasons or not settings.on_gpu:
        return measured_eagerly(runs, settings), "eager" if settings.on_gpu else settings.clock
    times = measured_eagerly({name: graph.replay for name, graph in graphs.items()}, settings)
    for graph in graphs.values():
        graph.reset()
    return Times({n: [s / GRAPH_CALLS for s in t] for n, t in times.seconds.items()}), "graph"


def measured_eagerly(runs: Mapping[str, Run], settings: Settings) -> Times:
    """The same by calling them; several calls to a look at the clock where they are short."""
    many = {name: _repeated(run, settings) for name, run in runs.items()}

    def seconds(run: Run) -> float:
        start = now(settings)
        run()
        return now(settings) - start

    calls = {name: run for name, (run, _) in many.items()}
    times = take_turns(calls, settings.rounds, settings.seconds, seconds)
    return Times({n: [s / many[n][1] for s in taken] for n, taken in times.seconds.items()})


def _repeated(run: Run, settings: Settings) -> tuple[Run, int]:
    """As many calls as take long enough to be timed, and their number."""
    if not settings.at_least:
        return run, 1
    run()
    start = now(settings)
    run()
    spent = max(now(settings) - start, 1e-6)
    count = max(1, min(MOST_CALLS, int(settings.at_least / spent)))

    def many() -> None:
        for _ in range(count):
            run()

    return many, count


def recorded(runs: Mapping[str, Run]) -> tuple[dict[str, Any], dict[str, str]]:
    """A CUDA graph of calls of each candidate; reasons where there can be none."""
    graphs: dict[str, Any] = {}
    reasons: dict[str, str] = {}
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


def said(error: BaseException) -> str:
    """What an error says, in a line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def tried(runs: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """What each gives; why the others give nothing."""
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, run in runs.items():
        try:
            found[name] = run()
            synchronize()
        except Exception as error:  # whoever cannot do this says so in many ways
            failed[name] = said(error)
    return found, failed


class Roof:
    """What the machine can do at most: torch's own matrix product and copy, as candidates.

    They are timed in the same rounds as what is held against them.
    """

    def __init__(self, settings: Settings, small: bool = False) -> None:
        self._settings = settings
        self._runs: dict[str, Run] = {}
        self.size = 256 if small else 8192 if settings.on_gpu else 1024
        self.copied = 2**20 if small else 2**30 if settings.on_gpu else 2**26

    @property
    def flops(self) -> float:
        """Of a call of ``matrix``."""
        return 2.0 * self.size**3

    @property
    def bytes(self) -> float:
        """Of a call of ``copy``, read and written both counted."""
        return 2.0 * self.copied

    def matrix(self, dtype: torch.dtype) -> Run:
        """A large product in ``dtype``; fp16 in fp32 on CPUs, which mostly have nothing for it."""
        if dtype == torch.float16 and not self._settings.on_gpu:
            dtype = torch.float32
        name = str(dtype)
        if name not in self._runs:
            shape, device = (self.size, self.size), self._settings.device
            a, b = (torch.randn(shape, device=device).to(dtype) for _ in "ab")
            self._runs[name] = lambda: a @ b
        return self._runs[name]

    def copy(self) -> Run:
        """A copy within the device's memory."""
        if "copy" not in self._runs:
            device = self._settings.device
            a, b = (torch.ones(self.copied, dtype=torch.uint8, device=device) for _ in "ab")
            self._runs["copy"] = lambda: b.copy_(a)
        return self._runs["copy"]

    def record(self, dtypes: list[str]) -> dict[str, Any]:
        """Both, measured now: floating point operations and bytes a second."""
        runs = {name: self.matrix(DTYPES[name]) for name in dtypes} | {"copy": self.copy()}
        times, _ = measured(runs, self._settings)
        rates = {name: self.flops / times.median(name) for name in dtypes}
        return {
            "record": "roofline",
            "flops_per_s": rates,
            "bytes_per_s": self.bytes / times.median("copy"),
        }
