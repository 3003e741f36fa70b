"""What carries bytes between ranks: each link alone, and each verb of usp over all of them.

usp bench comm --quick
usp bench comm --processes 4 --json comm.json

A link is one rank sending to one other, for every pair. ``shift`` is a hop of a ring: all send to
their neighbour at once. ``all_to_all`` is the head exchange, ``all_gather`` and ``all_reduce`` what
they say. Each is checked first: what arrives is what was sent. Bytes are those that leave a rank.
A line through the times of all sizes gives what a message costs (``latency_s``) and what a byte
costs (``bytes_per_s``), for a planner.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from usp.bench import world as worlds
from usp.bench.options import parse, parser, whole
from usp.bench.program import run_in_processes
from usp.bench.records import Record, not_timed, time_records
from usp.bench.world import World
from usp.distributed.comm import Axis
from usp.distributed.processes import Tell

VERBS = ("link", "shift", "all_to_all", "all_gather", "all_reduce")
Call = Callable[[], Tensor]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    made = parser("comm", __doc__)
    add = made.add_argument
    add("--processes", type=whole, default=4)
    add("--verbs", nargs="+", choices=VERBS, default=list(VERBS))
    sizes = [2**10, 2**14, 2**18, 2**22, 2**24]
    add("--sizes", nargs="+", type=whole, default=sizes, help="bytes of a message")
    add("--cores", type=whole, help="that all processes share (default: all)")
    args = parse(made, argv, sizes=[2**10, 2**16])
    if args.processes < 2:
        made.error(f"--processes must be 2 or more, got {args.processes}")
    least = 8 * args.processes
    if min(args.sizes) < least:
        made.error(f"--sizes must be {least} or more for {args.processes} ranks, got "
                   f"{min(args.sizes)}")  # fmt: skip
    return args


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    every = len(args.verbs) * len(args.sizes)
    return run_in_processes("comm", args, measure_all, every, lambda run: fits(run.sink.records))


def measure_all(world: World, rank: int, tell: Tell) -> None:
    """On each process: every verb with every size."""
    with worlds.joined(world, rank):
        measure_cases(world, tell)


def measure_cases(world: World, tell: Tell) -> None:
    """Every verb with every size, on every rank."""
    for verb in world.args.verbs:
        for size in world.args.sizes:
            tell(f"{verb}, {size} bytes")
            tell(measure(verb, size, worlds.axis(), world))


def measure(verb: str, size: int, axis: Axis, world: World) -> list[Record]:
    runs = calls(verb, size, axis, world.device)
    results, failed = worlds.tried_together(
        {name: checked for name, (_, checked, _) in runs.items()}
    )
    right = worlds.everyone({name: bool(found) for name, found in results.items()})
    refused = {
        name: "what arrived is not what was sent"
        for name in results
        if not all(told.get(name) for told in right)
    }
    out = {**failed, **refused}
    kept = {name: run for name, (run, _, _) in runs.items() if name not in out}
    case = {"bytes": size, "processes": axis.size, "device": world.device}
    times = worlds.turns(dict(kept), world.args.rounds, world.args.seconds)
    more = {n: {"bytes_per_s": runs[n][2] / times.median(n), "sent": runs[n][2]} for n in kept}
    return [*time_records(verb, case, times, more=more), *not_timed(verb, case, out, refused)]


def calls(
    verb: str, size: int, axis: Axis, device: str
) -> dict[str, tuple[Call, Callable[[], bool], int]]:
    """By name: the call, a check of what it gives, and the bytes that leave a rank."""
    own, every = filled(size, axis.rank, device), range(axis.size)
    if verb == "link":
        return {
            f"{a} to {b}": (partial(link, axis, a, b, own), partial(arrived, axis, a, b, own), size)
            for a in every
            for b in every
            if a != b
        }
    before = filled(size, (axis.rank - 1) % axis.size, device)
    out, whole = torch.empty_like(own), own.new_empty(axis.size * size)
    part = size // axis.size
    pieces = [part] * axis.size
    numbers = torch.zeros(size // 4, device=device)

    def shift() -> Tensor:
        return axis.shift(own, out)()

    def all_to_all() -> Tensor:
        return axis.all_to_all(own[: part * axis.size], pieces, pieces)

    def all_gather() -> Tensor:
        return axis.all_gather(own, whole, [size] * axis.size)()

    def all_reduce() -> Tensor:
        return axis.all_reduce(numbers)

    def reduced() -> bool:
        numbers.fill_(axis.rank + 1.0)
        found = bool((all_reduce() == sum(range(1, axis.size + 1))).all())
        numbers.zero_()
        return found

    gathered = [filled(size, rank, device) for rank in every]
    mine = slice(axis.rank * part, (axis.rank + 1) * part)
    exchanged = torch.cat([x[mine] for x in gathered])
    others = axis.size - 1
    return {
        "shift": {"shift": (shift, lambda: torch.equal(shift(), before), size)},
        "all_to_all": {
            "all_to_all": (
                all_to_all, lambda: torch.equal(all_to_all(), exchanged), part * others
            )
        },
        "all_gather": {
            "all_gather": (
                all_gather, lambda: torch.equal(all_gather(), torch.cat(gathered)), size * others
            )
        },
        # of a ring: a reduce-scatter and an all-gather of a part each
        "all_reduce": {"all_reduce": (all_reduce, reduced, 2 * (size // axis.size) * others)},
    }[verb]  # fmt: skip


def filled(size: int, rank: int, device: str) -> Tensor:
    """What a rank sends: known everywhere, and another of each."""
    return ((torch.arange(size, device=device) + 31 * rank) % 251).to(torch.uint8)


def link(axis: Axis, source: int, to: int, own: Tensor) -> Tensor:
    """One message between two ranks; all others wait."""
    into = torch.empty_like(own)
    send = [(to - source, own)] if axis.rank == source else []
    receive = [(source - to, into)] if axis.rank == to else []
    axis.exchange(send, receive)()
    return into


def arrived(axis: Axis, source: int, to: int, own: Tensor) -> bool:
    found = link(axis, source, to, own)
    if axis.rank != to:
        return True
    return torch.equal(found, filled(len(own), source, str(own.device)))


def fits(records: list[Record]) -> list[Record]:
    """Of each verb and link: seconds of a message and bytes a second, by a line through medians.

    Each size counts alike: squares of relative errors are least.
    """
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for record in records:
        if record["record"] == "time":
            key = record["what"], record["candidate"]
            points.setdefault(key, []).append((record["sent"], record["median"]))
    found = []
    for (what, name), some in points.items():
        if len(some) < 2:
            continue
        latency, each = line_through(some)
        values = {"latency_s": latency, "bytes_per_s": 1 / each if each > 0 else None}
        label = name if what == name else f"{what} {name}"
        told = {"record": "value", "what": "fit", "case": {}, "candidate": label}
        found.append({**told, "values": values})
    return found


def line_through(points: list[tuple[float, float]]) -> tuple[float, float]:
    """``seconds = latency + each * bytes``, neither below 0, with the least relative errors."""
    weights = [1 / t**2 for _, t in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_t = sum(w * t for w, (_, t) in zip(weights, points, strict=True)) / total
    over = sum(w * (x - mean_x) * (t - mean_t) for w, (x, t) in zip(weights, points, strict=True))
    under = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    each = max(over / under, 0.0) if under else 0.0
    return max(mean_t - each * mean_x, 0.0), each
