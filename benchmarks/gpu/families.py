"""What the GPU benchmark measures, in the order of its worth: items that each give records."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from gpu.case import key_of, others, own
from gpu.measure import Run, Settings, peak_memory, ratio, timed, timed_eagerly
from gpu.ring import VirtualRing
from gpu.sizes import Sizes, sizes_for
from usp.bench.attention import Problem
from usp.bench.case import Case
from usp.bench.device import DTYPES
from usp.bench.exact import relative_error, wrong
from usp.bench.libraries import MERGES, libraries
from usp.bench.steps import HeadExchange, RingStep

Record = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One thing to measure. ``key`` names it in reports."""

    family: str
    key: str
    measure: Callable[[], list[Record]]


def items(settings: Settings) -> Iterator[Item]:
    """The most valuable first: what there is no time for is the rarest."""
    sizes = sizes_for(settings.device)
    for case in sizes.core:
        yield Item("local", key_of(case), partial(local, case, settings))
    for n in sizes.step_lengths:
        yield Item("ring_steps", f"ring step {n}", partial(ring_step, n, sizes, settings))
    for ranks, which in itertools.product(sizes.rings, ("forward", "both")):
        measure = partial(ring, ranks, which, sizes, settings)
        yield Item("rings", f"ring {ranks} {which}", measure)
    for degree, which in itertools.product(sizes.exchange_ranks, ("scatter", "gather")):
        measure = partial(exchange, degree, which, sizes, settings)
        yield Item("exchange", f"exchange {degree} {which}", measure)
    for case in sizes.rest:
        yield Item("local", key_of(case), partial(local, case, settings))


def judged(errors: dict[str, Any], failed: dict[str, str], dtype: str) -> Record:
    """Errors, who is wrong, and why whoever is not timed is not."""
    refused = wrong(errors, DTYPES[dtype])
    return {"errors": errors, "wrong": refused, "not_timed": {**failed, **refused}}


def local(case: Case, settings: Settings) -> list[Record]:
    """Attention on one device, forward and backward."""
    usps = own(case.dtype, case.head_dim, settings.device)
    problem = Problem(case, settings.device, usps, others(case, settings.device))
    checks = {name: partial(problem.errors, name) for name in problem.candidates}
    about = judged(*settings.tried(checks), case.dtype)
    names = [name for name in checks if name not in about["not_timed"]]
    about["usp"] = list(problem.own)
    records = []
    for which in ("forward", "backward"):
        result = timed({name: problem.run(name, which) for name in names}, settings)
        tflops = {name: case.flops(which) / s / 1e12 for name, s in result["seconds"].items()}
        records.append({**asdict(case), **about, **result, "pass": which, "tflops": tflops})
    return records


def ring_step(length: int, sizes: Sizes, settings: Settings) -> list[Record]:
    """One step into a state that holds a block: usp, and libraries with either merge."""
    heads = 2 * sizes.ring_heads
    q, k, v, k2, v2 = sizes.randn(settings.device, 5, 1, length, heads, sizes.head_dim)
    step = RingStep(q, ((k, v), (k2, v2)))
    ours = own(sizes.dtype, sizes.head_dim, settings.device)
    steps: dict[str, Callable[..., Any]] = {
        name: partial(step.usp, contestant) for name, contestant in ours.items()
    }
    for (name, library), (how, merge) in itertools.product(
        libraries(settings.device).items(), MERGES.items()
    ):
        steps[f"{name} + {how}"] = partial(step.library, library, merge)
    new_state = partial(step.state, next(iter(ours.values())))
    results, failed = settings.tried(
        {n: partial(after, new_state(), run) for n, run in steps.items()}
    )
    exact = step.exact(heads - 1)
    errors = {n: {"out": relative_error(out[0, :, -1], exact)} for n, out in results.items()}
    about = judged(errors, failed, sizes.dtype)
    runs = {n: partial(s, new_state()) for n, s in steps.items() if n not in about["not_timed"]}
    for name in [name for name in runs if name in ours]:
        runs[f"{name}, no state"] = partial(steps[name], step.no_state())
    shape = {"length": length, "heads": heads, "head_dim": sizes.head_dim}
    eager = timed_eagerly(runs, settings)["seconds"]
    return [{**shape, **about, **timed(runs, settings), "eager_seconds": eager}]


def after(state: Any, step: Callable[..., Any]) -> torch.Tensor:
    """out once a step has been taken."""
    step(state)
    out: torch.Tensor = state.out
    return out


def ring(ranks: int, which: str, sizes: Sizes, settings: Settings) -> list[Record]:
    """A causal zigzag ring whose ranks take turns, and one call for the whole sequence."""
    length, heads = ranks * sizes.ring_length, sizes.ring_heads
    made = VirtualRing(ranks, sizes.randn(settings.device, 4, 1, length, heads, sizes.head_dim))
    usps = own(sizes.dtype, sizes.head_dim, settings.device)
    makers: dict[str, Callable[..., Run]] = {
        name: partial(made.usp, contestant, which) for name, contestant in usps.items()
    }
    for name, library in libraries(settings.device).items():
        merge = MERGES["Python merge"]
        makers[f"{name} + Python merge"] = partial(made.library, library, merge, which)
    runs = {name: make(range(ranks)) for name, make in makers.items()}
    exact = made.exact()
    about = judged(
        *settings.tried(
            {name: partial(ring_errors, made, run, exact) for name, run in runs.items()}
        ),
        sizes.dtype,
    )
    runs = {name: run for name, run in runs.items() if name not in about["not_timed"]}
    peaks = {name: peak_memory(makers[name](range(ranks)[-1:]), settings) for name in runs}
    ours = [name for name in usps if name in runs]
    for name in ours:
        runs[f"{name}, one call"] = made.one_call(usps[name], which)
    result = timed(runs, settings)
    theirs = peaks.get("flash + Python merge", 0)
    found = {
        "efficiency": {name: ratio(result, f"{name}, one call", name) for name in ours},
        "peak_bytes": peaks,
        "memory": {name: peaks[name] / theirs for name in ours if theirs},
    }
    shape = {"ranks": ranks, "local_length": sizes.ring_length, "heads": heads, "pass": which}
    return [{**shape, "head_dim": sizes.head_dim, **about, **result, **found}]


def ring_errors(made: VirtualRing, run: Run, exact: dict[str, torch.Tensor]) -> dict[str, float]:
    return made.errors(run(), exact)


def exchange(degree: int, which: str, sizes: Sizes, settings: Settings) -> list[Record]:
    """All of a head exchange but sending, against a copy of as many bytes in the same rounds."""
    shape = (3, 1, sizes.exchange_tokens, sizes.exchange_heads, sizes.head_dim)
    made = HeadExchange(degree, *sizes.randn(settings.device, *shape))
    runs = made.runs(which)
    results, failed = settings.tried(dict(runs))
    refused = {
        name: "what arrived is not what was sent"
        for name, found in results.items()
        if not all(map(torch.equal, found, made.expected(which)))
    }
    failed |= refused
    runs = {name: run for name, run in runs.items() if name not in failed}
    result = timed(runs | {"copy": made.copy}, settings)
    found = {
        "of_copy": {name: ratio(result, "copy", name) for name in runs},
        "bytes_moved": made.bytes_moved,
    }
    about = {"degree": degree, "pass": which, "wrong": refused, "not_timed": failed}
    return [{**about, **result, **found}]
