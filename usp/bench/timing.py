"""Timing that stands noise: candidates in turn, ratios inside one round, medians of rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

# Time waiting for a core counts on a wall clock only; time spinning for another thread on both.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Times:
    """Seconds of each candidate in each round; round i of all was taken within one stretch."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def quantile(self, name: str, share: float) -> float:
        """The time that this share of the rounds stays within, between neighbours linearly."""
        return quantile(self.seconds[name], share)

    def ratio(self, over: str, under: str) -> float:
        """Median over rounds of time(over) / time(under)."""
        return paired_ratio(self.seconds[over], self.seconds[under])


def quantile(values: list[float], share: float) -> float:
    """Between the two neighbours of place ``share * (n - 1)`` linearly; 0 is the least."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def paired_ratio(over: list[float], under: list[float]) -> float:
    """Median over rounds of one time over the other, both taken in the same rounds."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def interleave(
    candidates: dict[str, Callable[[], object]], rounds: int, budget: float, clock: str = "wall"
) -> Times:
    """Time candidates in turn, in both orders, after one call of each that does not count.

    Args:
        rounds: At most so many; at least 3.
        budget: Seconds after which no further round begins.
        clock: One of CLOCKS.
    """
    now = CLOCKS[clock]

    def seconds(run: Callable[[], object]) -> float:
        start = now()
        run()
        return now() - start

    return take_turns(candidates, rounds, budget, seconds)


def take_turns(
    candidates: dict[str, Callable[[], object]],
    rounds: int,
    budget: float,
    seconds: Callable[[Callable[[], object]], float],
    agree: Callable[[bool], bool] = bool,
) -> Times:
    """Like ``interleave``, with one's own way to time a call.

    Args:
        seconds: What a call took.
        agree: Of several processes that take turns together: what the first of them says.
    """
    for run in candidates.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for index in range(rounds):
        if index >= LEAST_ROUNDS and agree(time.perf_counter() - begin > budget):
            break
        order = list(candidates)
        for name in order if index % 2 == 0 else reversed(order):
            taken[name].append(seconds(candidates[name]))
    return Times(taken)
