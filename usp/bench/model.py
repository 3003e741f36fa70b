"""A step of training of a ViT and of a language model, whole and sharded.

usp bench model --quick
usp bench model --models vit llm --seq-len 4096 --mesh 2x2 1x4 --json model.json
usp bench model --models llama3-8b --layers 2 --seq-len 32768 --dtypes bf16      (GPUs)

Forward, backward and the sum of gradients over ranks, without an optimizer: by one process with
torch's attention and all cores, by one with usp's, and on each mesh (ulysses x ring, or
dp x ulysses x ring), with the same weights, in the same processes and in turn. Nothing is timed
whose gradients are more than three times as far from fp64 as torch's own.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from usp.bench import world as worlds
from usp.bench.device import DTYPES
from usp.bench.models import KNOWN, StepCase, wrong_gradients
from usp.bench.options import add_dtypes, dtypes, parse, parser, whole
from usp.bench.program import run_in_processes
from usp.bench.records import Record, not_timed, time_records
from usp.bench.spread import TORCH, Spread, gradient_errors, parse_spread, places, steps_of
from usp.bench.world import World
from usp.distributed.processes import Tell


def add_sizes(made: argparse.ArgumentParser) -> None:
    """Options of a step's sizes."""
    add = made.add_argument
    add("--models", nargs="+", choices=KNOWN, default=["vit", "llm"])
    add("--layers", type=whole, help="so many, and not the model's own")
    add("--seq-len", type=whole, default=2048)
    add("--batch", type=whole, default=2, help="of a step, over all data ranks")
    add("--cores", type=whole, help="that all processes share (default: all)")
    add_dtypes(made)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    made = parser("model", __doc__)
    add_sizes(made)
    meshes = [Spread(1, 2, 2), Spread(1, 1, 4), Spread(2, 1, 2)]
    made.add_argument("--mesh", nargs="+", type=parse_spread, default=meshes, metavar="[DPx]UxR")
    args = parse(made, argv, seq_len=64, layers=1)
    check_sizes(made, args, args.mesh)
    args.processes = max(spread.size for spread in args.mesh)
    return args


def check_sizes(
    made: argparse.ArgumentParser, args: argparse.Namespace, spreads: Sequence[Spread]
) -> None:
    for spread in spreads:
        if args.batch % spread.dp:
            made.error(f"--batch {args.batch} does not divide by {spread.dp} data ranks")
    for name, spread in itertools.product(args.models, spreads):
        if KNOWN[name].heads < spread.ulysses:
            made.error(f"{name} has {KNOWN[name].heads} heads, a Ulysses degree of "
                       f"{spread.ulysses} needs as many")  # fmt: skip


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    names = dtypes(args) if args.device == "cuda" or args.dtypes else ["fp32"]
    args.dtypes = names
    return run_in_processes("model", args, measure_all, len(list(cases(args))))


def cases(args: argparse.Namespace) -> Iterator[StepCase]:
    for dtype, name in itertools.product(args.dtypes, args.models):
        shape = KNOWN[name]
        if args.layers:
            shape = replace(shape, layers=args.layers)
        yield StepCase(dtype, shape, args.seq_len, args.batch)


def measure_all(world: World, rank: int, tell: Tell) -> None:
    """On each process: every case."""
    with worlds.joined(world, rank):
        measure_cases(world, tell)


def measure_cases(world: World, tell: Tell) -> None:
    """Every case, on every rank."""
    placed = places(world.args.mesh, world)
    for case in cases(world.args):
        tell(str(case))
        steps = steps_of(case, placed, world)
        errors, failed = gradient_errors(case, steps, world)
        tell(measure(case, steps, errors, failed, world))


def measure(
    case: StepCase,
    steps: Mapping[str, Callable[[], Any]],
    errors: dict[str, float],
    failed: dict[str, str],
    world: World,
) -> list[Record]:
    """Candidates in turn."""
    refused = wrong_gradients(errors, TORCH, DTYPES[case.dtype])
    out = {**failed, **refused}
    runs = {name: step for name, step in steps.items() if name not in out}
    times = worlds.turns(runs, world.args.rounds, world.args.seconds)
    more = {
        name: {
            "flops_per_s": case.flops / times.median(name),
            "tokens_per_s": case.tokens / times.median(name),
            "errors": {"gradients": errors[name]},
        }
        for name in runs
    }
    named = case.named() | {"processes": world.size}
    return [*time_records("step", named, times, more=more),
            *not_timed("step", named, out, refused)]  # fmt: skip
