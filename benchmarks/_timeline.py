"""When each rank of a ring computes, has messages in flight, and waits: recorded and drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from usp.attention import block
from usp.distributed.comm import Axis, Wait

Interval = tuple[float, float]
# What a row of the picture shows, from top to bottom: height, colour, label.
LANES = {
    "attention_forward": (0, 0.44, "#0072b2", "kernel, forward"),
    "attention_backward": (0, 0.44, "#56b4e9", "kernel, backward"),
    "blocks": (0.48, 0.14, "#009e73", "K and V in flight, from post to the return of wait"),
    "gradients": (0.66, 0.14, "#e69f00", "dK and dV in flight"),
}
WAITING = ("#d55e00", "of it spent waiting, nothing computed")


@dataclass
class Timeline:
    """Of one rank, in seconds of a clock that all processes share.

    Attributes:
        intervals: By kind: those of LANES, each with the messages' own waits in `waits`.
        messages: Bytes and hops of each, in order.
    """

    intervals: dict[str, list[Interval]] = field(default_factory=lambda: {k: [] for k in LANES})
    waits: dict[str, list[Interval]] = field(default_factory=lambda: {k: [] for k in LANES})
    messages: list[tuple[int, int]] = field(default_factory=list)

    @property
    def computing(self) -> list[Interval]:
        return union(self.intervals["attention_forward"] + self.intervals["attention_backward"])

    @property
    def in_flight(self) -> list[Interval]:
        return union(self.intervals["blocks"] + self.intervals["gradients"])

    @property
    def waiting(self) -> list[Interval]:
        return union(self.waits["blocks"] + self.waits["gradients"])

    @property
    def ends(self) -> Interval:
        every = [interval for found in self.intervals.values() for interval in found]
        return min(start for start, _ in every), max(stop for _, stop in every)


@contextmanager
def recorded(block_bytes: int) -> Iterator[Timeline]:
    """What usp does inside. A message of ``block_bytes`` is K and V, any other their gradients."""
    timeline, shift = Timeline(), Axis.shift

    def noted(axis: Axis, message: Tensor, out: Tensor, by: int = 1) -> Wait:
        kind = "blocks" if message.numel() == block_bytes else "gradients"
        timeline.messages.append((message.numel(), by))
        posted = time.perf_counter()
        wait = shift(axis, message, out, by)

        def noted_wait() -> Tensor:
            start = time.perf_counter()
            arrived = wait()
            stop = time.perf_counter()
            timeline.intervals[kind].append((posted, stop))
            timeline.waits[kind].append((start, stop))
            return arrived

        return noted_wait

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(Axis, "shift", noted))
        for name in ("attention_forward", "attention_backward"):
            compute = _timed(getattr(block, name), timeline.intervals[name])
            patches.enter_context(mock.patch.object(block, name, compute))
        yield timeline


def _timed(compute: Callable[..., Any], intervals: list[Interval]) -> Callable[..., Any]:
    """Notes when one block's computation begins and ends."""

    def call(*args: Any) -> Any:
        start = time.perf_counter()
        result = compute(*args)
        intervals.append((start, time.perf_counter()))
        return result

    return call


def seconds_alone(axis: Axis, messages: list[tuple[int, int]]) -> float:
    """What the same messages take one by one, with nothing to compute."""
    sent, out = (torch.zeros(max(n for n, _ in messages), dtype=torch.uint8) for _ in range(2))
    dist.barrier()
    start = time.perf_counter()
    for size, by in messages:
        axis.shift(sent[:size], out[:size], by)()
    return time.perf_counter() - start


def union(intervals: list[Interval]) -> list[Interval]:
    joined: list[Interval] = []
    for start, stop in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def total(intervals: list[Interval]) -> float:
    return sum(stop - start for start, stop in intervals)


def common(one: list[Interval], two: list[Interval]) -> float:
    """Seconds in both unions."""
    both = ((max(a, c), min(b, d)) for a, b in one for c, d in two)
    return sum(stop - start for start, stop in both if stop > start)


def hidden_share(timelines: list[Timeline]) -> float:
    """Of the time that messages are in flight, how much the same rank computes."""
    hidden = sum(common(t.in_flight, t.computing) for t in timelines)
    return hidden / sum(total(t.in_flight) for t in timelines)


def draw(timelines: list[Timeline], title: str, file: Path) -> None:
    """One row a rank, kernels above its messages; seconds from the first kernel or post."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.2 + 1.1 * len(timelines)), layout="constrained")
    axes = figure.subplots()
    origin = min(t.ends[0] for t in timelines)

    def bars(intervals: list[Interval], top: float, height: float, colour: str, label: str) -> None:
        spans = [(start - origin, stop - start) for start, stop in intervals]
        axes.broken_barh(
            spans, (top, height), facecolor=colour, edgecolor="white", linewidth=0.6, label=label
        )

    for rank, timeline in enumerate(timelines):
        for kind, (offset, height, colour, label) in LANES.items():
            first = label if rank == 0 else ""
            bars(timeline.intervals[kind], rank + offset, height, colour, first)
            bars(timeline.waits[kind], rank + offset, height, WAITING[0], "")
    axes.plot([], [], color=WAITING[0], linewidth=6, label=WAITING[1])
    axes.set_yticks([rank + 0.4 for rank in range(len(timelines))])
    axes.set_yticklabels([f"rank {rank}" for rank in range(len(timelines))])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(timelines) - 0.1, -0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=120)
