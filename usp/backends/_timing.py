"""Which family of kernels is the fastest here: measured in turn, what is wrong not at all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from operator import itemgetter
from typing import Any

import torch

from usp.backends import _self_check, trust
from usp.backends._local import LocalRow
from usp.backends._self_check import Problem
from usp.kernels import architecture
from usp.planning.heads import Heads
from usp.planning.problem import Block, Scoring, Traits
from usp.planning.visit import Span, Visit, whole_visit

_ROUNDS_AT_LEAST, _ROUNDS_AT_MOST = 3, 50
_SHORTEST = 0.005  # seconds that one sample takes at least
# who takes so many times as long as the fastest of a case is not measured further
_HOPELESS = 8.0


@dataclass(frozen=True)
class Case:
    """Attention on one device: causal or of all pairs, with its backward."""

    dtype: torch.dtype
    batch: int
    length: int
    heads: int
    head_dim: int
    causal: bool

    def traits(self, device: torch.device) -> Traits:
        return Traits(
            device_type=device.type,
            dtype=self.dtype,
            head_dim=self.head_dim,
            value_head_dim=self.head_dim,
            softmax_scale=self.head_dim**-0.5,
            architecture=architecture(device),
            device=device,
        )

    def problem(self, device: torch.device) -> Problem:
        """Two query heads share a key head."""
        generator = torch.Generator(device).manual_seed(0)

        def randn(heads: int) -> torch.Tensor:
            shape = self.batch, self.length, heads, self.head_dim
            x = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
            return x.to(self.dtype)

        visit = whole_visit(self.length, self.length)
        if self.causal:
            at = torch.arange(self.length, dtype=torch.int32, device="cpu")
            span = Span(torch.zeros_like(at), at + 1)
            visit = Visit(self.length, self.length, span)
        heads = Heads(0, self.heads, self.heads, 2)
        q, k, v = randn(self.heads), randn(self.heads // 2), randn(self.heads // 2)
        block = Block(q, k, v, visit, heads, Scoring(self.head_dim**-0.5))
        dlse = q.new_zeros((self.batch, self.heads, self.length), dtype=torch.float32)
        return Problem("timed", (block,), randn(self.heads), dlse)


# By the type of the device, the most telling first.
CASES: dict[str, tuple[Case, ...]] = {
    "cpu": tuple(
        Case(dtype, 1, length, 8, head_dim, causal)
        for length in (1024, 256)
        for dtype in (torch.float32, torch.bfloat16)
        for head_dim in (64, 128)
        for causal in (True, False)
    ),
    "cuda": tuple(
        Case(dtype, 16384 // length, length, 16, head_dim, causal)
        for length in (8192, 2048)
        for head_dim in (128, 64)
        for dtype in (torch.bfloat16, torch.float16)
        for causal in (True, False)
    ),
}


@dataclass
class Measured:
    """What was found.

    Attributes:
        ratios: Of each family and case the median over rounds of its time over the first one's.
        left_out: Names, and why they were not measured, or not to the end.
        hopeless: Of those that were much slower than the fastest, by how much.
    """

    ratios: list[dict[str, float]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    hopeless: dict[str, float] = field(default_factory=dict)

    def row(self) -> LocalRow:
        """The order, by the geometric mean over all cases.

        Raises:
            RuntimeError: nothing was measured.
        """
        names = [name for name in (self.ratios or [{}])[0] if self._stayed(name)]
        if not names:
            raise RuntimeError(f"nothing could be measured: {self.left_out}")
        mean = {
            name: math.exp(statistics.fmean(math.log(found[name]) for found in self.ratios))
            for name in names
        }
        least = min(mean.values())
        times = {name: mean[name] / least for name in sorted(names, key=mean.__getitem__)}
        times |= dict(sorted(self.hopeless.items(), key=itemgetter(1)))
        date = datetime.now(timezone.utc).date().isoformat()
        return LocalRow(tuple(times), date, tuple(round(x, 3) for x in times.values()))

    def _stayed(self, name: str) -> bool:
        return name not in self.left_out and name not in self.hopeless


def measure(families: Sequence[Any], device: torch.device, budget: float) -> Measured:
    """Time every family that takes the cases of a device and is right there.

    Args:
        families: Of ``backends.TABLE``.
        budget: Seconds; about so long it takes, once everything is checked and compiled.
    """
    measured, cases = Measured(), CASES[device.type]
    left = _taking_part(families, cases, device, measured)
    begin = time.perf_counter()
    for index, case in enumerate(cases):
        spent = time.perf_counter() - begin
        if (index and spent >= budget) or not left:
            break
        calls = _calls(case, left, device, measured)
        ratios = _taken_in_turn(calls, (budget - spent) / (len(cases) - index), device)
        measured.ratios.append(ratios)
        fastest = min(ratios.values(), default=1.0)
        for name, ratio in ratios.items():
            if ratio > _HOPELESS * fastest:
                measured.hopeless[name] = ratio / fastest
        left = [family for family in left if measured._stayed(family.NAME)]
    return measured


def _taking_part(
    families: Sequence[Any], cases: Sequence[Case], device: torch.device, measured: Measured
) -> list[Any]:
    """Those that take every case and are right; why others do not is noted."""
    kinds = list(dict.fromkeys(case.traits(device) for case in cases))
    for family in families:
        reasons = dict.fromkeys(reason for kind in kinds for reason in family.reasons_against(kind))
        if reasons:
            measured.left_out[family.NAME] = "; ".join(reasons)
    left = [family for family in families if measured._stayed(family.NAME)]
    pairs = [(family, kind) for family in left for kind in kinds]
    for (family, _), wrong in zip(pairs, trust.check_again(pairs), strict=True):
        if wrong is not None:
            measured.left_out[family.NAME] = f"it is wrong here: {wrong}"
    return [family for family in left if measured._stayed(family.NAME)]


def _calls(
    case: Case, families: Sequence[Any], device: torch.device, measured: Measured
) -> dict[str, Callable[[], object]]:
    """Forward with backward by each family; who raises is left out."""
    problem = case.problem(device)
    calls: dict[str, Callable[[], object]] = {}
    for family in families:

        def call(family: Any = family) -> object:
            return _self_check.run(family, problem)

        try:
            call()
            _await(device)
        except Exception as error:
            said = str(error).strip().splitlines()[:1]
            measured.left_out[family.NAME] = f"{type(error).__name__}: {''.join(said)}"
        else:
            calls[family.NAME] = call
    return calls


def _taken_in_turn(
    calls: dict[str, Callable[[], object]], budget: float, device: torch.device
) -> dict[str, float]:
    """Median over rounds of each one's time over the first one's within the round."""
    begin = time.perf_counter()
    once = {name: _seconds(call, 1, device) for name, call in calls.items()}
    fastest = min(once.values(), default=0.0)
    rounds = [once]
    taken = [name for name, seconds in once.items() if seconds <= _HOPELESS * fastest]
    for index in range(_ROUNDS_AT_MOST):
        if index >= _ROUNDS_AT_LEAST and time.perf_counter() - begin > budget:
            break
        order = taken if index % 2 == 0 else taken[::-1]
        found = {}
        for name in order:
            repeats = max(1, math.ceil(_SHORTEST / once[name]))
            found[name] = _seconds(calls[name], repeats, device)
        rounds.append(found)
    return dict(_ratios(tuple(calls), taken, rounds))


def _ratios(
    names: Sequence[str], taken: Sequence[str], rounds: Sequence[dict[str, float]]
) -> Iterator[tuple[str, float]]:
    for name in names:
        counted = rounds[1:] if name in taken else rounds[:1]
        yield name, statistics.median(found[name] / found[taken[0]] for found in counted)


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Of one call."""
    _await(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _await(device)
    return (time.perf_counter() - start) / repeats


def _await(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
