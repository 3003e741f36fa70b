"""Lengths of the documents of a batch, drawn from distributions with a long tail."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class LogNormal:
    """One document is the longest, all others are drawn, and none is longer.

    Attributes:
        tokens: Of all documents together.
        longest: Tokens of the longest.
        median, sigma: Of the log-normal distribution of the others; sigma of the logarithm.
    """

    tokens: int
    longest: int
    median: float
    sigma: float

    def boundaries(self, seed: int) -> tuple[int, ...]:
        """In an order that is drawn, too; alike on every rank."""
        drawn, lengths = random.Random(seed), [self.longest]
        lengths += _filled(
            self.tokens - self.longest,
            lambda: min(drawn.lognormvariate(math.log(self.median), self.sigma), self.longest),
        )
        drawn.shuffle(lengths)
        return (0, *accumulate(lengths))


@dataclass(frozen=True)
class Published:
    """Lengths of real documents: all are drawn, the last one is cut.

    They are those of the 99,519 documents that DistCA's repository (hao-ai-lab/distca,
    ``distca/simulator/data/dist_wlbllm.json``) gives for WLB-LLM (arXiv:2503.17924), by their
    quantiles, shortened alike so that 131,072 tokens, a context of theirs, become the batch.

    Attributes:
        tokens: Of all documents together.
    """

    tokens: int

    def boundaries(self, seed: int) -> tuple[int, ...]:
        """In the order in which they were drawn; alike on every rank."""
        drawn = random.Random(seed)
        scale = self.tokens / _CONTEXT
        return (
            0,
            *accumulate(_filled(self.tokens, lambda: scale * published_length(drawn.random()))),
        )


_CONTEXT = 131_072
# Which part of the documents is at most so long; between these the logarithm is a line.
_QUANTILES = {
    0.0: 1,
    0.01: 63,
    0.05: 324,
    0.1: 646,
    0.25: 1606,
    0.5: 3227,
    0.75: 4832,
    0.9: 5784,
    0.95: 6110,
    0.97: 6236,
    0.98: 10080,
    0.985: 13216,
    0.99: 26070,
    0.995: 69118,
    0.998: 99310,
    1.0: 124913,
}


def published_length(part: float) -> float:
    """The length that so large a part of the documents does not exceed."""
    low, high = next(each for each in pairwise(_QUANTILES) if part <= each[1])
    place = (part - low) / (high - low)
    return float(_QUANTILES[low] ** (1 - place) * _QUANTILES[high] ** place)


def _filled(tokens: int, draw: Callable[[], float]) -> list[int]:
    """Lengths of at least one token that make up all tokens."""
    lengths: list[int] = []
    while tokens > 0:
        lengths.append(max(1, min(round(draw()), tokens)))
        tokens -= lengths[-1]
    return lengths
