"""How fast pairs of ranks send to each other."""

from __future__ import annotations

import time

import torch

from usp.diagnosis.report import Link
from usp.distributed.comm import Axis

SMALL, LARGE = 4 * 2**10, 4 * 2**20
ROUNDS = {SMALL: 20, LARGE: 5}
ALL_PAIRS = 8  # of more ranks neighbours alone


def pairs(size: int) -> list[tuple[int, int]]:
    """Which pairs are measured, one behind the other."""
    if size <= ALL_PAIRS:
        return [(a, b) for a in range(size) for b in range(a + 1, size)]
    return [(a, (a + 1) % size) for a in range(size)]


def measured(axis: Axis, device: torch.device, hosts: list[str]) -> list[Link]:
    """The links of which this rank is the first; collective, the others are idle meanwhile."""
    found = []
    for first, second in pairs(axis.size):
        axis.gather_objects(None)
        if axis.rank not in (first, second):
            continue
        other = second if axis.rank == first else first
        latency = _seconds(axis, other, SMALL, device)
        rate = LARGE / _seconds(axis, other, LARGE, device)
        if axis.rank == first:
            found.append(Link((first, second), latency, rate, hosts[first] == hosts[second]))
    axis.gather_objects(None)
    return found


def _seconds(axis: Axis, other: int, size: int, device: torch.device) -> float:
    """The least that a message each way took."""
    message, out = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    step, least = other - axis.rank, float("inf")
    for _ in range(1 + ROUNDS[size]):
        start = time.perf_counter()
        axis.exchange([(step, message)], [(step, out)])()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        least = min(least, time.perf_counter() - start)
    return least
