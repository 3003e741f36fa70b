"""A batch of documents of very different lengths: a degree for each, beside one mesh for all.

usp bench documents --quick
usp bench documents --seeds 0 1 2 3 4 --json documents.json
usp bench documents --tokens 16384 --longest 0.5 --hidden 256
usp bench documents --lengths published --seeds 0 1 2 3 4

Processes of this machine train one transformer layer (forward, backward, the sum of gradients) on
packed documents, a batch for each seed: "log-normal", one of a part of the batch, the others of
log-normal lengths; "published", all of lengths that were published of real ones. "scheduled" gives
each document the ranks that it is worth (usp.schedule_documents, by a cost measured at the start),
on the mesh (Ulysses x ring) that its model finds best; "static" shares every document among all
ranks: on each mesh that they can form, in each layout, by the transport that is fastest in a first
look; "whole" leaves every document on one rank. They run in turn, in both orders, a barrier before
each; the slowest rank counts. Nothing is timed whose output or gradients differ from fp64 on one
process.

Then follow, for each batch, the times of the others over the schedule's, of which the least of a
static one is the "best static" one's, and their geometric means over seeds: by the clock ("wall");
by the CPU seconds of the rank that has most ("busiest_cpu"), which is what counts on cores of its
own, where nobody waits; and by those of the cores here ("cores_cpu"), where all ranks together may
have more to do than the busiest one. "bound" is by busiest_cpu, too: the best static one's over
those of whole documents, were they perfectly even. Where ranks share cores, the cost is measured in
CPU seconds, for the schedule knows who shares.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from statistics import geometric_mean
from typing import Any

from torch import Tensor

import usp
from usp.bench import world as worlds
from usp.bench.device import DTYPES
from usp.bench.document_batch import Batch, Way
from usp.bench.document_cost import CostOfLayer, Meshes
from usp.bench.document_lengths import LogNormal, Published
from usp.bench.options import Run, add_dtypes, dtypes, parse, parser, positive, whole
from usp.bench.program import run_in_processes
from usp.bench.records import Record, not_timed, time_records
from usp.bench.timing import Times
from usp.bench.world import World
from usp.distributed.processes import Tell

ALLOWED = {"fp32": 1e-5, "bf16": 5e-2}  # relative rms error; sums of thousands of rounded terms
SCHEDULED, WHOLE, STATIC, BEST = "usp scheduled", "usp whole", "usp static", "best static"
LENGTHS = ["log-normal", "published"]
CLOCKS = "wall", "busiest_cpu", "cores_cpu", "bound"
LAYER, RATIO = "layer, both", "static / scheduled"
_MEANS = ("dtype", "lengths", "tokens", "longest")
_CASE = ("processes", "hidden", "heads", "mlp")


@dataclass(frozen=True)
class Found:
    """What was measured of a batch: times of the clock, and CPU seconds of each rank."""

    times: Times
    cpu: dict[str, list[float]]
    best: str  # schedule, by its model
    at_once: float  # ranks that compute at once

    @cached_property
    def seconds(self) -> dict[str, dict[str, float]]:
        """Of each way, by each clock."""
        found = {name: {"wall": self.times.median(name)} for name in self.times.seconds}
        for name, cpu in self.cpu.items():
            busiest, cores = max(cpu), sum(cpu) / self.at_once
            found[name] |= {"busiest_cpu": busiest, "cores_cpu": max(busiest, cores)}
        return found

    def ratios(self, name: str) -> dict[str, float]:
        ours = self.seconds[self.best]
        found = {clock: theirs / ours[clock] for clock, theirs in self.seconds[name].items()}
        return found | {"wall": self.times.ratio(name, self.best)}

    def best_static(self) -> dict[str, Any]:
        """Its ratio to the schedule, by each clock on its own, and its name."""
        found: dict[str, Any] = {}
        each = {n: self.ratios(n) for n in self.times.seconds if n.startswith(STATIC)}
        for clock in self.seconds[self.best] if each else ("wall",):
            name = min(each, key=lambda n: each[n][clock])
            found |= {clock: each[name][clock], f"{clock} of": name.removeprefix(f"{STATIC} ")}
            if clock == "busiest_cpu" and WHOLE in self.cpu:
                whole = self.cpu[WHOLE]
                found["bound"] = max(self.cpu[name]) / (sum(whole) / len(whole))
        return found


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    made = parser("documents", __doc__)
    made.set_defaults(seconds=5.0)
    add = made.add_argument
    add("--processes", type=whole, default=4)
    add("--tokens", type=whole, nargs="+", default=[4096, 8192], help="of all documents of a batch")
    add("--lengths", nargs="+", choices=LENGTHS, default=LENGTHS, help="of documents")
    add(
        "--longest",
        type=float,
        nargs="+",
        default=[0.125, 0.25],
        help="of log-normal documents, as a part of the batch",
    )
    add("--median", type=positive, default=64.0, help="tokens of the others")
    add("--sigma", type=positive, default=1.25, help="of their logarithm: more is a longer tail")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a batch each")
    add("--hidden", type=whole, default=128)
    add("--heads", type=whole, default=4)
    add("--mlp", type=whole, help="(default: 4 x hidden)")
    add("--cores", type=whole, help="that all processes share (default: all)")
    add_dtypes(made)
    args = parse(
        made, argv, tokens=[2048], longest=[0.25], lengths=LENGTHS[:1], hidden=64, seeds=[0]
    )
    if args.processes < 2:
        made.error(f"--processes must be 2 or more, got {args.processes}")
    if not all(0 < each <= 1 for each in args.longest):
        made.error(f"--longest must be above 0 and at most 1, got {args.longest}")
    if args.hidden % args.heads:
        made.error(f"--heads {args.heads} does not divide --hidden {args.hidden}")
    args.mlp = args.mlp or 4 * args.hidden
    return args


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    args.dtypes = dtypes(args)
    cases = len(args.dtypes) * len(args.seeds) * len(_distributions(args))
    return run_in_processes("documents", args, measure_all, cases, means)


def _distributions(args: argparse.Namespace) -> list[LogNormal | Published]:
    """Of the lengths of documents."""
    found: list[LogNormal | Published] = []
    for tokens in args.tokens:
        if "log-normal" in args.lengths:
            longest = [max(1, int(part * tokens)) for part in args.longest]
            found += [LogNormal(tokens, each, args.median, args.sigma) for each in longest]
        if "published" in args.lengths:
            found.append(Published(tokens))
    return found


def measure_all(world: World, rank: int, tell: Tell) -> None:
    """On each process: every dtype and batch."""
    with worlds.joined(world, rank):
        measure_batches(world, tell)


def measure_batches(world: World, tell: Tell) -> None:
    """On every rank."""
    args, size = world.args, world.size
    shapes = [(u, size // u) for u in range(1, min(size, args.heads) + 1) if size % u == 0]
    forms = [usp.submeshes(worlds.mesh(shape, world.device)) for shape in shapes]
    most = next((each for each in forms[-1] if each and each.ring_degree == 1), None)
    for named in args.dtypes:
        clock = "cpu" if forms[0].shared else args.clock
        found = CostOfLayer(args, DTYPES[named], world.device, clock)(forms[0], most)
        cost: usp.DocumentCost = worlds.everyone(found)[0]
        for lengths, seed in product(_distributions(args), args.seeds):
            batch = Batch(args, DTYPES[named], world.device, lengths.boundaries(seed))
            kind = LENGTHS[isinstance(lengths, Published)]
            case = {"dtype": named, "lengths": kind, **vars(lengths), "seed": seed}
            case |= {"documents": len(batch.cuts) - 1}
            case |= {name: value for name, value in vars(args).items() if name in _CASE}
            tell(measure(args, case, batch, forms, cost))


def measure(
    args: argparse.Namespace,
    case: dict[str, Any],
    batch: Batch,
    forms: Sequence[Meshes],
    cost: usp.DocumentCost,
) -> list[Record]:
    schedules = dict(_schedules(batch, forms, cost))
    ways = {name: batch.scheduled(schedule) for name, (schedule, _) in schedules.items()}
    ways |= _static_ways(batch, forms)
    errors = {name: worlds.everyone(batch.errors(way))[0] for name, way in ways.items()}
    allowed = ALLOWED[case["dtype"]]
    wrong = {
        name: f"{what} is off by {error:.2e}, more than {allowed:.0e}"
        for name, found in errors.items()
        for what, error in found.items()
        if not error <= allowed
    }
    right = {name: way for name, way in ways.items() if name not in wrong}
    ours = {n: s.degrees.makespan for n, (s, _) in schedules.items() if n != WHOLE and n in right}
    times, cpu = _timed(right, args)
    more: dict[str, dict[str, Any]] = {name: {"errors": errors[name]} for name in right}
    for name, shown in more.items():
        shown["tokens_per_s"] = batch.cuts[-1] / times.median(name)
        if cpu:
            shown["cpu_s_of_ranks"] = cpu[name]
        if name in schedules:
            shown |= _told(*schedules[name]) | {"cost": vars(cost)}
        else:
            shown["transport"] = ways[name].transport
    records = [
        *time_records(LAYER, case, times, more=more),
        *not_timed(LAYER, case, wrong, wrong),
    ]
    if ours:
        best = min(ours, key=lambda name: ours[name])
        together = forms[0].shared
        at_once = together[0].at_once if together else float(args.processes)
        records += _ratios(case, Found(times, cpu, best, at_once))
    return records


def _schedules(
    batch: Batch, forms: Sequence[Meshes], cost: usp.DocumentCost
) -> Iterator[tuple[str, tuple[usp.DocumentSchedule, float]]]:
    """Schedules on each mesh, and the seconds that each took to find."""
    # messages that nobody can pay leave every document whole
    for name, each, price in [
        *((f"{SCHEDULED} {_shape(each)}", each, cost) for each in forms),
        (WHOLE, forms[0], replace(cost, hop=1e9)),
    ]:
        begun = time.perf_counter()
        schedule = usp.schedule_documents(batch.cuts, each, price)
        yield name, (schedule, time.perf_counter() - begun)


def _whole(meshes: Meshes) -> usp.SequenceMesh:
    assert meshes[0] is not None
    return meshes[0]


def _shape(meshes: Meshes) -> str:
    return f"{_whole(meshes).ulysses_degree}x{_whole(meshes).ring_degree}"


def _static_ways(batch: Batch, forms: Sequence[Meshes]) -> dict[str, Way]:
    """Each mesh and layout, by the transport that is fastest in two rounds."""
    found = {}
    for meshes in forms:
        for layout, ways in batch.static(_whole(meshes)):
            seconds = [worlds.slowest_seconds(way.run) for way in ways]
            seconds = [worlds.slowest_seconds(way.run) for way in ways] if ways[1:] else seconds
            found[f"{STATIC} {_shape(meshes)} {layout}"] = ways[seconds.index(min(seconds))]
    return found


def _timed(ways: dict[str, Way], args: argparse.Namespace) -> tuple[Times, dict[str, list[float]]]:
    """By the clock, the slowest rank; and CPU seconds, the least of each rank."""
    spent: dict[str, list[float]] = {name: [] for name in ways}

    def run(name: str) -> list[Tensor]:
        begun = time.process_time()
        found = ways[name].run()
        spent[name].append(time.process_time() - begun)
        return found

    times = worlds.turns({n: partial(run, n) for n in ways}, args.rounds, args.seconds)
    if args.device == "cuda":
        return times, {}
    return times, {name: worlds.everyone(min(each[1:])) for name, each in spent.items()}


def _told(schedule: usp.DocumentSchedule, planning: float) -> dict[str, Any]:
    degrees = [at.degree for at in schedule.degrees.placed]
    return {
        "degrees": {d: degrees.count(d) for d in sorted(set(degrees))},
        "planning_s": planning,
        "makespan": schedule.degrees.makespan,
    }


def _ratios(case: dict[str, Any], found: Found) -> Iterator[Record]:
    """Of each static way, and of the best one."""
    told = {"record": "value", "what": RATIO, "case": case}
    for name in found.times.seconds:
        if name.startswith((STATIC, WHOLE)):
            yield {**told, "candidate": name, "values": found.ratios(name)}
    yield {**told, "candidate": BEST, "values": {**found.best_static(), "to": found.best}}


def means(run: Run) -> Iterator[Record]:
    """Geometric means of the ratios over the seeds."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in run.sink.records:
        if record.get("what") == RATIO:
            batch = tuple((n, record["case"][n]) for n in _MEANS if n in record["case"])
            found.setdefault((batch, record["candidate"]), []).append(record["values"])
    for (batch, name), values in found.items():
        yield {
            "record": "value",
            "what": f"geometric mean of {RATIO}",
            "case": {**dict(batch), "batches": len(values)},
            "candidate": name,
            "values": {
                clock: geometric_mean([each[clock] for each in values])
                for clock in CLOCKS
                if clock in values[0]
            },
        }
