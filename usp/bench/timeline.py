"""When each rank of a ring computes, has messages in flight, and waits: recorded and drawn."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from usp.attention import block
from usp.bench import world as worlds
from usp.bench.case import Case
from usp.bench.records import Record
from usp.bench.ring_case import RingAttention, mesh_of_ring
from usp.bench.world import World
from usp.distributed.comm import Axis, Wait
from usp.distributed.processes import Tell

Interval = tuple[float, float]
# What a row of the picture shows, from top to bottom: height, colour, label.
LANES = {
    "attention_forward": (0, 0.44, "#0072b2", "kernel, forward"),
    "attention_backward": (0, 0.44, "#56b4e9", "kernel, backward"),
    "blocks": (0.48, 0.14, "#009e73", "K and V in flight, from post to the return of wait"),
    "gradients": (0.66, 0.14, "#e69f00", "dK and dV in flight"),
}
WAITING = ("#d55e00", "of it spent waiting, nothing computed")


Parts = Sequence[tuple[int, Tensor]]


class Messages(NamedTuple):
    """What is posted at once: for each message how many places on its peer is, and bytes."""

    send: tuple[tuple[int, int], ...]
    receive: tuple[tuple[int, int], ...]


@dataclass
class Timeline:
    """Of one rank, in seconds of a clock that all processes share.

    Attributes:
        intervals: By kind: those of LANES, each with the messages' own waits in `waits`.
        messages: In order.
    """

    intervals: dict[str, list[Interval]] = field(default_factory=lambda: {k: [] for k in LANES})
    waits: dict[str, list[Interval]] = field(default_factory=lambda: {k: [] for k in LANES})
    messages: list[Messages] = field(default_factory=list)

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
def recorded() -> Iterator[Timeline]:
    """What usp does inside, whose keys are passed along the ring: they are shifted, and their
    gradients exchanged."""
    timeline, shift, exchange = Timeline(), Axis.shift, Axis.exchange

    def noted(kind: str, posted: float, wait: Callable[[], Any]) -> Callable[[], Any]:
        def noted_wait() -> Any:
            start = time.perf_counter()
            arrived = wait()
            stop = time.perf_counter()
            timeline.intervals[kind].append((posted, stop))
            timeline.waits[kind].append((start, stop))
            return arrived

        return noted_wait

    def noted_shift(axis: Axis, message: Tensor, out: Tensor, by: int = 1) -> Wait:
        timeline.messages.append(Messages(((by, message.numel()),), ((-by, out.numel()),)))
        posted = time.perf_counter()
        return noted("blocks", posted, shift(axis, message, out, by))

    def noted_exchange(axis: Axis, send: Parts, receive: Parts) -> Callable[[], None]:
        sizes = (tuple((step, x.numel()) for step, x in each) for each in (send, receive))
        timeline.messages.append(Messages(*sizes))
        posted = time.perf_counter()
        return noted("gradients", posted, exchange(axis, send, receive))

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(Axis, "shift", noted_shift))
        patches.enter_context(mock.patch.object(Axis, "exchange", noted_exchange))
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


def seconds_alone(axis: Axis, messages: list[Messages]) -> float:
    """What the same messages take one by one, with nothing to compute."""
    worlds.everyone(None)
    start = time.perf_counter()
    for each in messages:
        send, receive = (
            [(by, torch.empty(n, dtype=torch.uint8)) for by, n in part] for part in each
        )
        axis.exchange(send, receive)()
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


def traced(args: argparse.Namespace, size: int, case: Case) -> list[Record]:
    """One forward and backward of a ring of ``size`` drawn to ``args.trace``: a record a rank."""
    args.traced, args.transport = case, "ring"
    timelines, alone = zip(*worlds.in_processes(_one_pass, args, size), strict=True)
    share = hidden_share(list(timelines))
    draw(
        list(timelines),
        f"Forward and backward of a ring of {size}: {case}\n{100 * share:.0f} % of the time that "
        "messages are in flight is hidden under computation",
        args.trace,
    )
    return [
        _told(rank, case, *pair) for rank, pair in enumerate(zip(timelines, alone, strict=True))
    ]


def _told(rank: int, case: Case, timeline: Timeline, alone: float) -> Record:
    values = {
        "pass_s": timeline.ends[1] - timeline.ends[0],
        "computing_s": total(timeline.computing),
        "in_flight_s": total(timeline.in_flight),
        "hidden_s": common(timeline.in_flight, timeline.computing),
        "waiting_s": total(timeline.waiting),
        "messages_alone_s": alone,
    }
    what = {"record": "value", "what": "timeline", "case": case.named()}
    return {**what, "candidate": f"rank {rank}", "values": values}


def _one_pass(world: World, rank: int, tell: Tell) -> tuple[Timeline, float]:
    """On each process: what it did when, and what its messages take alone."""
    with worlds.joined(world, rank):
        case: Case = world.args.traced
        name, mesh = mesh_of_ring(world)
        attention = RingAttention(case, {name: mesh}, [], world)
        run = attention.candidate(name, "both")
        for _ in range(3):  # the last one counts
            worlds.everyone(None)
            with recorded() as timeline:
                run()
        return timeline, seconds_alone(mesh.ring, timeline.messages)
