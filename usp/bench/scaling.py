"""Strong and weak scaling of a step of training over data ranks and ranks of a sequence.

usp bench scaling --quick
usp bench scaling --models llm --processes 4 --seq-len 2048 --batch 4 --json scaling.json
usp bench scaling --batch 8 --accumulate 1 2 4

Some of the processes work, the others rest; all spreads of 1, 2, 4, ... processes over dp x
sequence ranks (--by ring, ulysses) are taken in turn in one run, each process with the same
number of threads. ``strong``: the same step by more processes. ``weak``: as many tokens for each,
longer sequences for the ranks of a sequence, more samples for data ranks. ``efficiency`` is the
rate of a process, in floating point operations, over that of one process alone in the same rounds:
1 is ideal. With several --accumulate a step of as many samples is computed in so many parts.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from usp.bench import world as worlds
from usp.bench.device import DTYPES
from usp.bench.model import add_sizes, check_sizes
from usp.bench.models import KNOWN, StepCase, wrong_gradients
from usp.bench.options import dtypes, parse, parser, whole
from usp.bench.program import run_in_processes
from usp.bench.records import Record, not_timed, time_records
from usp.bench.spread import Spread, gradient_errors, places, steps_of
from usp.bench.world import World
from usp.distributed.processes import Tell

KINDS = ("strong", "weak")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    made = parser("scaling", __doc__)
    add_sizes(made)
    add = made.add_argument
    add("--processes", type=whole, default=4, help="at most")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--by", choices=("ring", "ulysses"), default="ring", help="how a sequence is shared")
    add("--accumulate", nargs="+", type=whole, default=[1], help="micro batches of a step")
    made.set_defaults(models=["llm"], batch=4, seq_len=1024)
    args = parse(made, argv, seq_len=64, layers=1)
    if args.processes < 2:
        made.error(f"--processes must be 2 or more, got {args.processes}")
    args.spreads = list(spreads(args.processes, args.by))
    check_sizes(made, args, args.spreads)
    parts = max(s.dp for s in args.spreads) * max(args.accumulate)
    if args.batch % parts:
        made.error(f"--batch {args.batch} must divide by {parts}: data ranks times --accumulate")
    return args


def spreads(processes: int, by: str) -> Iterator[Spread]:
    """Of 1, 2, 4, ... processes, every dp."""
    size = 1
    while size <= processes:
        for dp in (dp for dp in range(1, size + 1) if size % dp == 0):
            sp = size // dp
            yield Spread(dp, sp, 1) if by == "ulysses" else Spread(dp, 1, sp)
        size *= 2


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    args.dtypes = dtypes(args) if args.device == "cuda" or args.dtypes else ["fp32"]
    every = len(list(bases(args))) * len(args.kinds)
    return run_in_processes("scaling", args, measure_all, every)


def bases(args: argparse.Namespace) -> Iterator[StepCase]:
    """Steps of one process."""
    for dtype, name, accumulate in itertools.product(args.dtypes, args.models, args.accumulate):
        shape = replace(KNOWN[name], layers=args.layers or KNOWN[name].layers)
        yield StepCase(dtype, shape, args.seq_len, args.batch, accumulate)


def measure_all(world: World, rank: int, tell: Tell) -> None:
    """On each process: every case."""
    with worlds.joined(world, rank):
        measure_cases(world, tell)


def measure_cases(world: World, tell: Tell) -> None:
    """Every case, on every rank."""
    placed = places(world.args.spreads, world)
    for base, kind in itertools.product(bases(world.args), world.args.kinds):
        tell(f"{kind}: {base}")
        cases = {spread: case_of(base, spread, kind) for spread in placed}
        steps: dict[str, Any] = {}
        errors: dict[str, float] = {}
        failed: dict[str, str] = {}
        for spread, case in cases.items():
            steps |= steps_of(case, {spread: placed[spread]}, world, alone=False)
        for spread, case in cases.items():
            name = str(spread)
            found, raised = gradient_errors(case, {name: steps[name]}, world)
            errors, failed = errors | found, failed | raised
        tell(measure(kind, base, cases, steps, errors, failed, world))


def case_of(base: StepCase, spread: Spread, kind: str) -> StepCase:
    """The whole step of a spread."""
    if kind == "strong":
        return base
    return replace(base, seq_len=base.seq_len * spread.sp, batch=base.batch * spread.dp)


def measure(
    kind: str,
    base: StepCase,
    cases: dict[Spread, StepCase],
    steps: dict[str, Any],
    errors: dict[str, float],
    failed: dict[str, str],
    world: World,
) -> list[Record]:
    """All spreads in turn, and how much of one process's rate each keeps."""
    first = str(next(iter(cases)))
    refused = wrong_gradients(errors, first, DTYPES[base.dtype])
    out = {**failed, **refused}
    runs = {name: step for name, step in steps.items() if name not in out}
    times = worlds.turns(runs, world.args.rounds, world.args.seconds)
    more = {}
    for spread, case in cases.items():
        name = str(spread)
        if name not in runs:
            continue
        more[name] = {
            "flops_per_s": case.flops / times.median(name),
            "tokens_per_s": case.tokens / times.median(name),
            "errors": {"gradients": errors[name]},
            "processes": spread.size,
            "length": case.seq_len,
            "samples": case.batch,
        }
        if first in runs:
            kept = times.ratio(first, name) * case.flops / cases[next(iter(cases))].flops
            more[name]["efficiency"] = kept / spread.size
    named = base.named() | {"by": world.args.by, "threads": world.threads}
    found = time_records(kind, named, times, more=more)
    return [*found, *not_timed(kind, named, out, refused)]
