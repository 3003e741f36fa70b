"""What a rank does from when to when: recorded while a step of attention runs.

Kernels of blocks, the messages of each hop, the exchange of heads, and the waits for these. What
lies between is planning, packing and merging.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from usp.attention import block
from usp.distributed import comm
from usp.distributed.comm import Axis
from usp.planning.problem import Block

COMPUTE, WAIT, SEND, RECEIVE = LANES = ("compute", "wait", "send", "receive")
# Ranks tell each other what they were asked for, in so many bytes at most.
MEETING, _FEW = "the ranks' meeting", 1024
_KERNELS = (
    *("attention_forward", "attention_once"),
    *("attention_backward", "attention_once_backward"),
)
Parts = Sequence[tuple[int, Tensor]]


@dataclass(frozen=True)
class Span:
    """Something that a rank does, or that is on its way to or from it.

    Attributes:
        lane: One of LANES. A message is there from its post until its wait returns.
        name: What, in a few words.
        start, stop: Seconds since all ranks began.
        peer: Global rank of the other end of a message; None of anything else.
        size: Bytes of a message.
    """

    lane: str
    name: str
    start: float
    stop: float
    peer: int | None = None
    size: int = 0

    @property
    def seconds(self) -> float:
        return self.stop - self.start


class HostClock:
    """Seconds of the host, for ranks that compute there."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds(self, mark: Any) -> float:
        return float(mark) - self._begin


class StreamClock:
    """Seconds of a GPU's current stream, which waits where the host does not."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._begin = self.mark()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: Any) -> float:
        mark.synchronize()
        return float(self._begin.elapsed_time(mark)) / 1e3


@dataclass
class Recorder:
    """Notes what happens inside of ``recording``.

    Attributes:
        clock: Of the device that computes.
    """

    clock: HostClock | StreamClock
    _noted: list[tuple[str, str, Any, Any, int | None, int]] = field(default_factory=list)

    def spans(self) -> list[Span]:
        """In order of time, once all is over."""
        seconds = self.clock.seconds
        found = [Span(la, n, seconds(a), seconds(b), p, s) for la, n, a, b, p, s in self._noted]
        return sorted(found, key=lambda span: (span.start, span.stop))

    def note(
        self, lane: str, name: str, start: Any, peer: int | None = None, size: int = 0
    ) -> None:
        self._noted.append((lane, name, start, self.clock.mark(), peer, size))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """usp's kernels and messages of this process are noted in here."""
        with ExitStack() as patches:
            for name in _KERNELS:
                which = "backward" if name.endswith("backward") else "forward"
                timed = self._timed(which, getattr(block, name))
                patches.enter_context(mock.patch.object(block, name, timed))
            for name, wrapped in (
                ("shift", self._shift(Axis.shift)),
                ("exchange", self._exchange(Axis.exchange)),
                ("all_gather", self._all_gather(Axis.all_gather)),
                ("all_to_all", self._all_to_all(Axis.all_to_all)),
            ):
                patches.enter_context(mock.patch.object(Axis, name, wrapped))
            yield

    def _timed(self, which: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def call(part: Block, *args: Any) -> Any:
            start = self.clock.mark()
            result = compute(part, *args)
            self.note(
                COMPUTE, f"{which}, {part.q.shape[1]} queries x {part.k.shape[1]} keys", start
            )
            return result

        return call

    def _on_its_way(
        self, axis: Axis, send: Parts, receive: Parts, what: str, wait: Callable[[], Any]
    ) -> Callable[[], Any]:
        """The wait of messages that were just posted, noted when it returns."""
        posted, is_over = self.clock.mark(), False

        def noted() -> Any:
            nonlocal is_over
            start = self.clock.mark()
            arrived = wait()
            if is_over:  # a wait may be asked twice
                return arrived
            is_over = True
            self.note(WAIT, f"for {what}", start)
            for lane, parts in ((SEND, send), (RECEIVE, receive)):
                for step, x in parts:
                    if x.numel():
                        self.note(lane, what, posted, _global(axis, step), x.nbytes)
            return arrived

        return noted

    def _shift(self, shift: Callable[..., Any]) -> Callable[..., Any]:
        def call(axis: Axis, message: Tensor, out: Tensor, by: int = 1) -> Any:
            wait = shift(axis, message, out, by)
            if by % axis.size == 0:
                return wait
            return self._on_its_way(axis, [(by, message)], [(-by, out)], "a block", wait)

        return call

    def _exchange(self, exchange: Callable[..., Any]) -> Callable[..., Any]:
        def call(axis: Axis, send: Parts, receive: Parts) -> Any:
            wait = exchange(axis, send, receive)
            return self._on_its_way(axis, send, receive, "rows of blocks or gradients", wait)

        return call

    def _all_gather(self, all_gather: Callable[..., Any]) -> Callable[..., Any]:
        def call(axis: Axis, message: Tensor, whole: Tensor, sizes: Sequence[int]) -> Any:
            wait = all_gather(axis, message, whole, sizes)
            pieces = whole.split(list(sizes))
            others = [step % axis.size for step in range(1, axis.size)]
            send = [(step, message) for step in others]
            receive = [(-step, pieces[(axis.rank - step) % axis.size]) for step in others]
            what = MEETING if message.nbytes <= _FEW else "all blocks"
            return self._on_its_way(axis, send, receive, what, wait)

        return call

    def _all_to_all(self, all_to_all: Callable[..., Any]) -> Callable[..., Any]:
        def call(axis: Axis, messages: Tensor, send: Sequence[int], recv: Sequence[int]) -> Any:
            if axis.size == 1:
                return all_to_all(axis, messages, send, recv)
            start = self.clock.mark()
            out = all_to_all(axis, messages, send, recv)
            self.note(WAIT, "for heads", start)
            for lane, sizes, x in ((SEND, send, messages), (RECEIVE, recv, out)):
                for rank, count in enumerate(sizes):
                    if rank != axis.rank and count:
                        peer = _global(axis, rank - axis.rank)
                        self.note(lane, "heads", start, peer, count * x.element_size())
            return out

        return call


def _global(axis: Axis, step: int) -> int:
    return comm.group_ranks(axis.group)[(axis.rank + step) % axis.size]


def seconds_in(spans: Sequence[Span], *lanes: str) -> list[tuple[float, float]]:
    """When a rank is in one of these lanes: intervals that do not overlap, in order."""
    joined: list[tuple[float, float]] = []
    for span in sorted((s for s in spans if s.lane in lanes), key=lambda s: s.start):
        if joined and span.start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], span.stop)
        else:
            joined.append((span.start, span.stop))
    return joined


def sums(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds of a rank: in all, in kernels, waiting, with messages under way, and how much of that
    it computes meanwhile; and the bytes that it sends."""
    compute, flight = seconds_in(spans, COMPUTE), seconds_in(spans, SEND, RECEIVE)
    hidden = (min(b, d) - max(a, c) for a, b in compute for c, d in flight)
    return {
        "step": max((s.stop for s in spans), default=0.0)
        - min((s.start for s in spans), default=0.0),
        "computing": _length(compute),
        "waiting": _length(seconds_in(spans, WAIT)),
        "in_flight": _length(flight),
        "hidden": sum(h for h in hidden if h > 0),
        "bytes_sent": sum(s.size for s in spans if s.lane == SEND),
    }


def _length(intervals: Sequence[tuple[float, float]]) -> float:
    return sum(stop - start for start, stop in intervals)
