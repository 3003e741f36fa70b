"""Peak memory of a rank, against the formula of ``usp plan``.

usp bench memory --quick
usp bench memory --models vit llm --seq-len 2048 4096 --mesh 1x1x1 2x2 1x4 --json memory.json

What a step holds at a time beside the weights: gradients, activations, messages. On a CPU
storages are counted one by one (usp.testing.StorageBytes), so the figures are the same on every
machine; on a GPU it is what torch's allocator says. Beside them stands what the planner predicts of
the rank with most (usp.planning.choose.memory), and what the attention alone takes, of usp and of
other rings in the same processes. Gradients are compared first, as in ``model``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from usp.bench import world as worlds
from usp.bench.case import Case
from usp.bench.device import DTYPES
from usp.bench.exact import wrong
from usp.bench.model import add_sizes, check_sizes
from usp.bench.models import KNOWN, StepCase, TrainStep, layout_of, wrong_gradients
from usp.bench.options import dtypes, parse, parser
from usp.bench.peers import PEERS, present
from usp.bench.program import run_in_processes
from usp.bench.records import Record, not_timed
from usp.bench.ring_case import ALONE, RingAttention, name_of
from usp.bench.spread import TORCH, Place, Spread, gradient_errors, parse_spread, places, steps_of
from usp.bench.world import World
from usp.distributed.processes import Tell
from usp.planning import cost
from usp.planning.choose.cluster import CLUSTERS
from usp.planning.choose.job import CHECKPOINTING, Choice, Job, Precision
from usp.planning.choose.memory import memory_of
from usp.testing import StorageBytes


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    made = parser("memory", __doc__)
    add_sizes(made)
    meshes = [Spread(1, 1, 1), Spread(1, 2, 2), Spread(1, 1, 4), Spread(1, 4, 1)]
    add = made.add_argument
    add("--mesh", nargs="+", type=parse_spread, default=meshes, metavar="[DPx]UxR")
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    add("--what", nargs="+", choices=("step", "attention"), default=["step", "attention"])
    add("--checkpointing", choices=CHECKPOINTING, default="none", help="default: %(default)s")
    made.set_defaults(batch=1, layout=None, transport="auto")
    args = parse(made, argv, seq_len=256, layers=1)
    check_sizes(made, args, args.mesh)
    args.processes = max(spread.size for spread in args.mesh)
    return args


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    args.dtypes = dtypes(args)
    return run_in_processes("memory", args, measure_all, len(list(cases(args))) * len(args.what))


def cases(args: argparse.Namespace) -> Iterator[StepCase]:
    for dtype, name in itertools.product(args.dtypes, args.models):
        shape = replace(KNOWN[name], layers=args.layers or KNOWN[name].layers)
        sizes = args.seq_len, args.batch
        yield StepCase(dtype, shape, *sizes, checkpointing=args.checkpointing)


def measure_all(world: World, rank: int, tell: Tell) -> None:
    """On each process: every case."""
    with worlds.joined(world, rank):
        measure_cases(world, tell)


def measure_cases(world: World, tell: Tell) -> None:
    """Every case, on every rank."""
    placed = places(world.args.mesh, world)
    for case, what in itertools.product(cases(world.args), world.args.what):
        tell(f"{what}: {case}")
        tell(of_steps(case, placed, world) if what == "step" else of_attention(case, world))


def of_steps(case: StepCase, placed: dict[Spread, Place | None], world: World) -> list[Record]:
    """Of a whole step, by each mesh, beside the formula."""
    steps = steps_of(case, placed, world)
    errors, failed = gradient_errors(case, steps, world)
    refused = wrong_gradients(errors, TORCH, DTYPES[case.dtype])
    out = {**failed, **refused}
    spreads = {str(spread): spread for spread in placed}
    found = []
    for name, step in steps.items():
        if name in out:
            continue
        peak = max(worlds.everyone(held(step, world.device)))
        values: dict[str, Any] = {"peak_bytes": peak}
        formula = predicted(case, spreads.get(name, Spread(1, 1, 1)), world.device)
        values |= {"formula": formula, "of_formula": peak / formula}
        found.append(value("step", case.named(), name, values))
    return [*found, *not_timed("step", case.named(), out, refused)]


def held(step: Any, device: str) -> int:
    """Most bytes that a step holds beside weights: gradients, activations, messages."""
    step = getattr(step, "step", step)
    if not isinstance(step, TrainStep):  # a rank that rests
        return 0
    step.module.zero_grad()
    return peak_bytes(step, device, as_op=step.case.checkpointing == "attention")


def predicted(case: StepCase, spread: Spread, device: str) -> float:
    """What ``usp plan`` says a rank holds beside its weights."""
    size = DTYPES[case.dtype].itemsize
    precision = Precision(
        weights=0, gradients=size, optimizer=0, element=size, matrix="fp32", loss="torch"
    )
    cluster = CLUSTERS["laptop"]  # of its memory nothing is asked
    job = Job(
        case.model, case.seq_len, case.batch, cluster, spread.size,
        precision=precision, zero=0, fused=device != "cpu",
    )  # fmt: skip
    choice = Choice(
        dp=spread.dp, ring=spread.ring, ulysses=spread.ulysses, layout=layout_of(case),
        transport="ring" if case.head_chunks > 1 else transport_of(job, spread),
        checkpointing=case.checkpointing,
        micro=case.batch // spread.dp // case.accumulate, head_chunks=case.head_chunks,
    )  # fmt: skip
    return memory_of(job, choice).total


def transport_of(job: Job, spread: Spread) -> str:
    """What "auto" is in the backward."""
    model, lengths = job.model, (job.seq_len, job.seq_len)
    dims = model.heads, model.kv_heads, model.head_dim, model.head_dim
    layout = "zigzag" if model.causal else "contiguous"
    place = cost.Place(spread.ring, spread.ulysses, 0, 0, layout, job.who_sees)
    moves = cost.what_moves(cost.Shape(1, *lengths, *dims, job.dtype()), place)
    return "query_ring" if moves.backward == "queries" else "ring"


def of_attention(case: StepCase, world: World) -> list[Record]:
    """Of one attention, forward and with its backward, beyond its inputs: usp and peers."""
    model = case.model
    mask = "causal" if model.causal else "full"
    shape = case.batch, case.seq_len, model.heads, model.kv_heads, model.head_dim
    attention_case = Case(case.dtype, *shape, mask)
    whole = [s for s in world.args.mesh if s.dp == 1 and s.size == world.size]
    meshes = {name_of((s.ulysses, s.ring)): worlds.mesh((s.ulysses, s.ring), world.device)
              for s in whole}  # fmt: skip
    attention = RingAttention(attention_case, meshes, present(world.args.peers)[0], world)
    errors, failed = worlds.everyone(attention.judged())[0]
    refused = wrong(errors, DTYPES[case.dtype])
    out = {**attention.reasons, **failed, **refused}
    named = attention_case.named() | {"processes": world.size}
    found = []
    for name in (name for name in attention.names if name not in out):
        values = {}
        for which in ("forward", "both"):
            run = attention.candidate(name, which)
            rest = 0 if name == ALONE and attention.rank else peak_bytes(run, world.device)
            values[which] = max(worlds.everyone(rest))
        found.append(value("attention", named, name, values))
    return [*found, *not_timed("attention", named, out, refused)]


def peak_bytes(run: Callable[[], object], device: str, as_op: bool = False) -> int:
    """Most bytes that live at a time of those that a call makes, on this rank.

    Args:
        as_op: Attention runs as one op, as under a checkpoint that keeps what it returns.
    """
    if device == "cpu":
        with attention_runs(as_op), StorageBytes() as memory:
            kept = run()
        del kept
        return memory.peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def attention_runs(as_op: bool) -> AbstractContextManager[object]:
    """Who listens sees attention as an op, which also saves what it was given; or as it runs where
    nobody does."""
    return mock.patch("usp.attention.watched.is_watched", return_value=as_op)


def value(what: str, case: dict[str, Any], name: str, values: dict[str, Any]) -> Record:
    return {"record": "value", "what": what, "case": case, "candidate": name, "values": values}
