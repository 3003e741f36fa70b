"""Where tensors wait until they are needed again: where they are, or in the memory of the host.

``fetch`` asks for tensors and returns at once; what it returns waits for them. Who fetches the next
ones before he computes with these overlaps the two, and finds them in two rooms that take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from usp.ops.pack import read

OFFLOADS = None, "cpu"
Fetched = Callable[[], list[Tensor]]
# At which every dtype may begin.
_ALIGNED = 16


class Reader(Protocol):
    """What is fetched one after the other."""

    def fetch(self, waiting: Sequence[Tensor]) -> Fetched:
        """Ask for what waits again; it is there until the next but one is asked for."""


class Store(Protocol):
    """Tensors that are put and fetched by one thread, in the order of its calls."""

    def put(
        self, tensors: Sequence[Tensor], places: Sequence[Tensor] | None = None, lent: bool = False
    ) -> list[Tensor]:
        """Let tensors wait; what it returns is what they are fetched by, and may be saved.

        Args:
            tensors: Not written to before ``settle``.
            places: What an earlier ``put`` of such tensors returned, to be written over.
            lent: Whether their memory is used for something else after that.
        """

    def settle(self) -> None:
        """From here on the memory of what was put may be used for something else."""

    def reader(self) -> Reader:
        """For what is needed one after the other."""

    def finish(self) -> None:
        """What was put is there, for whoever looks."""


class InPlace:
    """They stay where they are."""

    def put(
        self, tensors: Sequence[Tensor], places: Sequence[Tensor] | None = None, lent: bool = False
    ) -> list[Tensor]:
        return [x.clone() for x in tensors] if lent else list(tensors)

    def settle(self) -> None:
        pass

    def reader(self) -> Reader:
        return self

    def fetch(self, waiting: Sequence[Tensor]) -> Fetched:
        return lambda: list(waiting)

    def finish(self) -> None:
        pass


class OnHost:
    """Tensors of a CUDA device in pinned memory, copied by a stream beside the current one.

    Memory of the device is taken and given back in the order of the current stream alone: a copy
    to it waits for what was asked of that stream before, and a tensor that leaves is held until
    the stream waits for its copy. So no more of it is in use than is in flight.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._leaving: list[tuple[Any, Sequence[Tensor]]] = []

    def put(
        self, tensors: Sequence[Tensor], places: Sequence[Tensor] | None = None, lent: bool = False
    ) -> list[Tensor]:
        self.settle()
        if places is None:
            places = [self.room_for(x) for x in tensors]
        self._leaving.append((self.copied(places, tensors), tensors))
        return list(places)

    def settle(self) -> None:
        while self._leaving:
            self.current.wait_event(self._leaving.pop()[0])

    def reader(self) -> Reader:
        return _TwoRooms(self)

    def finish(self) -> None:
        self.settle()
        self.beside.synchronize()

    def copied(self, places: Sequence[Tensor], tensors: Sequence[Tensor]) -> Any:
        """Copy beside the current stream, behind all that it was given so far; what to wait for."""
        self.beside.wait_stream(self.current)
        with self.on_beside():
            for place, x in zip(places, tensors, strict=True):
                place.copy_(x, non_blocking=True)
        return self.beside.record_event()

    # what a test has to stand in for, where there is no GPU

    @property
    def current(self) -> Any:
        return torch.cuda.current_stream(self.device)

    @property
    def beside(self) -> Any:
        return _beside(self.device)

    def on_beside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.beside)

    def room_for(self, x: Tensor) -> Tensor:
        """On the host."""
        return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)


class _TwoRooms:
    """Room on the device for what is used now, and for what comes next."""

    def __init__(self, store: OnHost):
        self._nothing = torch.empty(0, dtype=torch.uint8, device=store.device)
        self._store, self._rooms = store, [self._nothing] * 2

    def fetch(self, waiting: Sequence[Tensor]) -> Fetched:
        store, sizes = self._store, [-(-x.nbytes // _ALIGNED) * _ALIGNED for x in waiting]
        self._rooms.reverse()
        if len(self._rooms[0]) < sum(sizes):
            self._rooms[0] = self._nothing  # first, that both are not there at a time
            self._rooms[0] = torch.empty(sum(sizes), dtype=torch.uint8, device=store.device)
        room = self._rooms[0]
        starts = accumulate(sizes, initial=0)
        found = [
            read(room[start : start + x.nbytes], x.shape, x.dtype)
            for start, x in zip(starts, waiting, strict=False)
        ]
        there = store.copied(found, waiting)

        def wait() -> list[Tensor]:
            store.current.wait_event(there)
            return found

        return wait


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """One for all stores of a device: their copies keep their order."""
    return torch.cuda.Stream(device)


def store_of(device: torch.device, offload: str | None) -> Store:
    """Where tensors of a device wait.

    Args:
        device: Theirs. Of a CPU they are in the memory of the host already.
        offload: None or "cpu".
    """
    if offload is None or device.type == "cpu":
        return InPlace()
    return OnHost(device)
