"""Spans of all ranks for people: a file that Perfetto opens, and a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from usp.diagnosis.spans import COMPUTE, LANES, RECEIVE, SEND, WAIT, Span

# Top and height of each lane in the row of its rank, and its colour.
DRAWN = {
    COMPUTE: (0.0, 0.40, "#0072b2"),
    WAIT: (0.42, 0.12, "#d55e00"),
    SEND: (0.56, 0.12, "#009e73"),
    RECEIVE: (0.70, 0.12, "#e69f00"),
}
BACKWARD = "#56b4e9"


def trace_events(ranks: Sequence[Sequence[Span]]) -> dict[str, Any]:
    """The JSON object format of Chrome's traces, which ui.perfetto.dev and chrome://tracing open.

    A process a rank, a thread a lane; an arrow leads from each message's post to its arrival.

    Source:
        "Trace Event Format", the Catapult project.
    """
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(ranks):
        events.append(_named("process_name", rank, 0, f"rank {rank}"))
        events += [_named("thread_name", rank, i, lane) for i, lane in enumerate(LANES)]
        events += [_complete(rank, span) for span in spans]
    return {"traceEvents": [*events, *_arrows(ranks)], "displayTimeUnit": "ms"}


def _named(kind: str, rank: int, lane: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": lane, "args": {"name": name}}


def _complete(rank: int, span: Span) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if span.peer is not None:
        told = {"to" if span.lane == SEND else "from": span.peer, "bytes": span.size}
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.lane,
        "pid": rank,
        "tid": LANES.index(span.lane),
        "ts": 1e6 * span.start,
        "dur": 1e6 * span.seconds,
        "args": told,
    }


def _arrows(ranks: Sequence[Sequence[Span]]) -> list[dict[str, Any]]:
    """Messages between two ranks keep their order: the first that left is the first that came."""
    sent: dict[tuple[int, int], list[Span]] = defaultdict(list)
    came: dict[tuple[int, int], list[Span]] = defaultdict(list)
    for rank, spans in enumerate(ranks):
        for span in spans:
            if span.lane == SEND and span.peer is not None:
                sent[rank, span.peer].append(span)
            if span.lane == RECEIVE and span.peer is not None:
                came[span.peer, rank].append(span)
    events, number = [], 0
    for (source, target), spans in sent.items():
        for leaves, arrives in zip(spans, came[source, target], strict=False):
            number += 1
            same = {"name": "message", "cat": "message", "id": number}
            events += [
                {"ph": "s", **same, "pid": source, "tid": 2, "ts": 1e6 * leaves.start},
                {"ph": "f", **same, "bp": "e", "pid": target, "tid": 3, "ts": 1e6 * arrives.stop},
            ]
    return events


def draw(ranks: Sequence[Sequence[Span]], title: str, file: Path) -> None:
    """A row a rank: its kernels, and below them its waits and its messages.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.4 + 1.1 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    origin = min((s.start for spans in ranks for s in spans), default=0.0)
    for rank, spans in enumerate(ranks):
        for lane, (top, height, colour) in DRAWN.items():
            found = [span for span in spans if span.lane == lane]
            colours = [BACKWARD if s.name.startswith("backward") else colour for s in found]
            bars = [(1e3 * (s.start - origin), 1e3 * s.seconds) for s in found]
            axes.broken_barh(
                bars, (rank + top, height), facecolor=colours, edgecolor="white", linewidth=0.5
            )
    shown = [("kernels, forward", DRAWN[COMPUTE][2]), ("kernels, backward", BACKWARD)]
    shown += [("waiting", DRAWN[WAIT][2]), ("sending", DRAWN[SEND][2])]
    for label, colour in [*shown, ("receiving", DRAWN[RECEIVE][2])]:
        axes.plot([], [], color=colour, linewidth=6, label=label)
    axes.set_yticks([rank + 0.4 for rank in range(len(ranks))])
    axes.set_yticklabels([f"rank {rank}" for rank in range(len(ranks))])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(ranks) - 0.05, -0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(file, dpi=120, format="png")
