"""A host and its streams for ``usp.ops.waiting`` where there is no GPU: memory that no counter of
storages sees, and copies that are made as early as they may be, or as late."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from usp.attention import chunked
from usp.ops.waiting import OnHost


class Elsewhere(OnHost):
    """What waits for a CPU as it would for a GPU."""

    def __init__(self, device: torch.device, is_late: bool = False):
        super().__init__(device)
        self.is_late = is_late
        self.copies: list[Callable[[], None]] = []
        self.done = self.fetched = 0

    def copied(self, places: Sequence[Tensor], tensors: Sequence[Tensor]) -> Any:
        if not self.is_late:
            return super().copied(places, tensors)

        def copy() -> None:
            for place, x in zip(places, tensors, strict=True):
                place.copy_(x)

        self.copies.append(copy)
        return len(self.copies)

    # itself the streams

    @property
    def current(self) -> Elsewhere:
        return self

    @property
    def beside(self) -> Elsewhere:
        return self

    def on_beside(self) -> Any:
        return nullcontext()

    def wait_stream(self, stream: Elsewhere) -> None:
        assert stream is self

    def record_event(self) -> int:
        return 0

    def wait_event(self, event: int) -> None:
        for copy in self.copies[self.done : event]:
            copy()
        self.done = max(self.done, event)

    def synchronize(self) -> None:
        self.wait_event(len(self.copies))

    def room_for(self, x: Tensor) -> Tensor:
        with _disable_current_modes():
            return torch.empty(x.shape, dtype=x.dtype, device="cpu")


@contextmanager
def elsewhere(is_late: bool = False) -> Iterator[None]:
    """Attention in chunks lets things wait there, whether it is asked to or not."""
    real = chunked.store_of
    chunked.store_of = lambda device, offload: Elsewhere(device, is_late)
    try:
        yield
    finally:
        chunked.store_of = real
