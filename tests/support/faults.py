"""Faults of one rank, for what must find them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from usp.diagnosis import checks
from usp.diagnosis.examine import Examination, examine
from usp.diagnosis.ranks import Note
from usp.distributed.comm import Axis

FAULTS = ("none", "corrupts", "hangs", "raises", "dies", "old torch")


@contextmanager
def fault(kind: str) -> Iterator[None]:
    """This rank's messages, or its attention, are at fault from now on."""
    shift, sharded = Axis.shift, checks.sharded

    def corrupts(axis: Axis, message: torch.Tensor, out: torch.Tensor, by: int = 1) -> Any:
        message = message.clone()
        message[3] += 1
        return shift(axis, message, out, by)

    def once(act: Callable[[], None]) -> Callable[..., Any]:
        def call(mesh: Any, transport: str, here: torch.device) -> str:
            if transport == "direct":
                act()
            return sharded(mesh, transport, here)

        return call

    def raises() -> None:
        raise KeyError("lost")

    acts = {"hangs": lambda: time.sleep(60), "raises": raises, "dies": lambda: os._exit(7)}
    if kind == "corrupts":
        patch: Any = mock.patch.object(Axis, "shift", corrupts)
    elif kind == "old torch":
        patch = mock.patch.object(torch, "__version__", "2.10.0")
    elif kind in acts:
        patch = mock.patch.object(checks, "sharded", once(acts[kind]))
    else:
        patch = mock.patch.object(torch, "pi", torch.pi)
    with patch:
        yield


def examined_with(kind: str, seconds: float) -> str:
    """What ``usp doctor`` finds in a pool's world of 2, of which rank 1 has a fault."""
    rank = torch.distributed.get_rank()
    return faulty((kind, seconds), rank, 2, lambda text: None)


def faulty(told: tuple[str, float], rank: int, ranks: int, note: Note) -> str:
    """The work of a rank; the last one has the fault."""
    kind, seconds = told
    with fault(kind if rank == ranks - 1 else "none"):
        return examine(Examination("cpu", seconds), rank, ranks, note)
