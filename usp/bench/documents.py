"""A batch of documents of very different lengths: a degree for each, beside one mesh for all.

usp bench documents --quick
usp bench documents --json documents.json

Processes of this machine train one transformer layer on packed documents with a long tail (Pareto).
"scheduled" gives each document the ranks that it is worth (usp.schedule_documents, by a cost
measured at the start of the run); the static ones share every document among all ranks: "zigzag"
cuts each document alike over them, "contiguous" cuts the packed batch. They run in turn, in both
orders, a barrier before each; the slowest rank counts. Records also hold the CPU seconds of each
rank, which say more where processes share cores. Nothing is timed whose output or parameter
gradients differ from fp64 on one process.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

import usp
from usp.bench import world as worlds
from usp.bench.device import DTYPES
from usp.bench.exact import relative_error
from usp.bench.options import (
    NO_ANSWER,
    BenchError,
    add_dtypes,
    begin,
    dtypes,
    finish,
    parse,
    parser,
)
from usp.bench.records import Record, not_timed, time_records
from usp.bench.world import World
from usp.distributed.processes import Tell

SCHEDULED, STATIC = "usp scheduled", ("usp zigzag", "usp contiguous")
ALLOWED = {"fp32": 1e-5, "bf16": 5e-2}  # relative rms error; sums of thousands of rounded terms


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    made = parser("documents", __doc__)
    add = made.add_argument
    add("--processes", type=int, default=4)
    add("--tokens", type=int, default=16384, help="of all documents together")
    add("--tail", type=float, default=0.9, help="exponent of Pareto: less is a longer tail")
    add("--shortest", type=int, default=32)
    add("--longest", type=int, default=4096)
    add("--hidden", type=int, default=256)
    add("--heads", type=int, default=4)
    add("--mlp", type=int, default=1024)
    add("--cores", type=int, help="that all processes share (default: all)")
    add_dtypes(made)
    return parse(made, argv, tokens=2048, longest=1024, hidden=64, mlp=128)


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    run = begin("documents", args)
    args.dtypes = dtypes(args)

    def hear(found: list[Record]) -> None:
        run.add(found)
        run.show.done()

    with run.show.progress(len(args.dtypes)):
        try:
            worlds.in_processes(measure_all, args, args.processes, hear)
        except BenchError as error:
            run.show.say(str(error))
            finish(run)
            return NO_ANSWER
    return finish(run)


def documents(args: argparse.Namespace) -> tuple[int, ...]:
    """Boundaries, the same on every rank."""
    drawn, lengths, left = random.Random(0), list[int](), args.tokens
    while left > 0:
        length = int(args.shortest * drawn.paretovariate(args.tail))
        lengths.append(min(length, args.longest, left))
        left -= lengths[-1]
    return (0, *accumulate(lengths))


class Layer(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.heads = args.heads
        self.norms = nn.ModuleList(nn.LayerNorm(args.hidden) for _ in range(2))
        self.qkv = nn.Linear(args.hidden, 3 * args.hidden)
        self.out = nn.Linear(args.hidden, args.hidden)
        self.up, self.down = nn.Linear(args.hidden, args.mlp), nn.Linear(args.mlp, args.hidden)

    def forward(self, x: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.out(attend(*qkv).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Batch:
    """A layer, a batch, and the ways to share it."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype, device: str) -> None:
        self.cuts = documents(args)
        torch.manual_seed(0)
        self.layer = Layer(args).to(dtype)
        self.x = torch.randn(1, self.cuts[-1], args.hidden).to(dtype)
        self.cotangent = torch.randn(self.x.shape).to(dtype)
        self.exact = None
        if worlds.axis().rank == 0:
            alone = Layer(args).double()
            alone.load_state_dict(self.layer.state_dict())
            whole = usp.schedule_documents(self.cuts, (None,), usp.DocumentCost(1, 1))
            out = alone(self.x.double(), lambda *qkv: whole.attention(*qkv, causal=True))
            self.exact = [out.detach(), *_gradients(alone, out, self.cotangent.double())]
        self.layer.to(device)
        self.x, self.cotangent = self.x.to(device), self.cotangent.to(device)

    def scheduled(self, schedule: usp.DocumentSchedule) -> list[Tensor]:
        return self._run(
            lambda x: schedule.shard(x, 1),
            lambda *qkv: schedule.attention(*qkv, causal=True, validate=False),
        )

    def static(self, mesh: usp.SequenceMesh, name: str) -> list[Tensor]:
        layout = usp.DocumentZigzag(self.cuts) if name == STATIC[0] else "contiguous"
        spread = usp.Spread(mesh, layout, self.cuts[-1], self.cuts, validate=False)

        def attend(*qkv: Tensor) -> Tensor:
            return cast(Tensor, spread.attention(*qkv, causal=True))

        return self._run(lambda x: spread.shard(x, 1), attend)

    def _run(
        self, shard: Callable[[Tensor], Tensor], attend: Callable[..., Tensor]
    ) -> list[Tensor]:
        """This rank's output, and its part of the parameters' gradients."""
        out = self.layer(shard(self.x), attend)
        return [out.detach(), *_gradients(self.layer, out, shard(self.cotangent))]

    def errors(self, found: list[Tensor], index: Tensor) -> dict[str, float]:
        """Of the whole output and of the summed gradients; on rank 0."""
        out, *gradients = found
        whole = worlds.rows_of_all(index, [out])
        for gradient in gradients:
            worlds.axis().all_reduce(gradient)
        if self.exact is None:
            return {}
        ours, exact = (_flat(x) for x in (gradients, self.exact[1:]))
        return {
            "out": relative_error(whole[0], self.exact[0]),
            "parameters": relative_error(ours, exact),
        }


def _gradients(layer: nn.Module, out: Tensor, cotangent: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, list(layer.parameters()), cotangent))


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten().double().cpu() for x in tensors])


def measured_cost(args: argparse.Namespace, dtype: torch.dtype, device: str) -> usp.DocumentCost:
    """Of this layer here: every rank measures while all do, and the first says."""
    layer = Layer(args).to(dtype).to(device)
    short, long = 64, max(1024, min(4096, args.longest))
    x = torch.randn(1, long, args.hidden).to(dtype).to(device)

    def run(length: int) -> tuple[float, float]:
        """Seconds of packed documents of one length, and their pairs."""
        attend = partial(
            usp.long_context_attention, causal=True, cu_seqlens=tuple(range(0, long + 1, length))
        )

        def both() -> None:
            _gradients(layer, layer(x, attend), x)

        both()
        return min(worlds.slowest_seconds(both) for _ in range(3)), long * (length + 1) / 2

    # as many tokens both times, so that what a call costs however short it is counts to neither
    (few, pairs), (many, all_pairs) = run(short), run(long)
    pair = max(0.0, (many - few) / (all_pairs - pairs))
    token = max(0.0, (few - pair * pairs) / long)
    hop, sent = _message(1, device), _message(1 << 20, device)
    # keys and values twice, and their gradients in fp32
    bytes_of_token = 2 * args.hidden * (2 * dtype.itemsize + 4)
    return usp.DocumentCost(token, pair, sent * bytes_of_token / 2**20, 3 * hop)


def _message(size: int, device: str) -> float:
    """Seconds in which every rank passes so many bytes on."""
    x, axis = torch.zeros(size, dtype=torch.uint8, device=device), worlds.axis()
    room = torch.empty_like(x)

    def pass_on() -> Tensor:
        return axis.shift(x, room)()

    pass_on()
    return min(worlds.slowest_seconds(pass_on) for _ in range(5))


def cpu_seconds(run: Callable[[], object], rounds: int) -> list[float]:
    """Of each rank, the least of some rounds: what it would take on cores of its own, where it does
    not wait. Processes that share cores hide in their times that some have less to do."""
    found = []
    for _ in range(rounds):
        worlds.everyone(None)  # together
        begun = time.process_time()
        run()
        found.append(time.process_time() - begun)
    return worlds.everyone(min(found))


def measure_all(world: World, rank: int, tell: Tell) -> None:
    """On each process: every dtype."""
    with worlds.joined(world, rank):
        measure_dtypes(world, tell)


def measure_dtypes(world: World, tell: Tell) -> None:
    """On every rank."""
    meshes = usp.submeshes(worlds.mesh((1, world.size), world.device))
    for dtype in world.args.dtypes:
        tell(measure(world.args, dtype, meshes, world.device))


def measure(
    args: argparse.Namespace,
    named: str,
    meshes: tuple[usp.SequenceMesh | None, ...],
    device: str,
) -> list[Record]:
    dtype, mesh = DTYPES[named], meshes[0]
    assert mesh is not None
    batch = Batch(args, dtype, device)
    cost: usp.DocumentCost = worlds.everyone(measured_cost(args, dtype, device))[0]
    begun = time.perf_counter()
    schedule = usp.schedule_documents(batch.cuts, meshes, cost)
    planning = time.perf_counter() - begun
    runs: dict[str, Callable[[], list[Tensor]]] = {SCHEDULED: partial(batch.scheduled, schedule)}
    index = {SCHEDULED: schedule.positions}
    for name in STATIC:
        runs[name] = partial(batch.static, mesh, name)
        layout = usp.DocumentZigzag(batch.cuts) if name == STATIC[0] else "contiguous"
        index[name] = usp.positions(batch.cuts[-1], mesh, layout)
    errors = worlds.everyone({n: batch.errors(run(), index[n]) for n, run in runs.items()})[0]
    wrong = {
        name: f"{what} is off by {error:.2e}, more than {ALLOWED[named]:.0e}"
        for name, found in errors.items()
        for what, error in found.items()
        if not error <= ALLOWED[named]
    }
    times = worlds.turns(
        {n: r for n, r in runs.items() if n not in wrong}, args.rounds, args.seconds
    )
    case = {"dtype": named, **{n: v for n, v in vars(args).items() if n in _CASE}}
    degrees = [at.degree for at in schedule.degrees.placed]
    case |= {"documents": len(degrees), "tokens": batch.cuts[-1]}
    more: dict[str, dict[str, Any]] = {
        name: {"tokens_per_s": batch.cuts[-1] / times.median(name), "errors": errors[name]}
        for name in times.seconds
    }
    if device == "cpu":
        for name, shown in more.items():
            shown["cpu_s_of_ranks"] = cpu_seconds(runs[name], args.rounds)
    more.get(SCHEDULED, {}).update(
        degrees={d: degrees.count(d) for d in sorted(set(degrees))},
        planning_s=planning,
        cost=vars(cost),
        makespan=schedule.degrees.makespan,
    )
    return [
        *time_records("layer, both", case, times, more=more),
        *not_timed("layer, both", case, wrong, wrong),
    ]


_CASE = ("processes", "tail", "shortest", "longest", "hidden", "heads", "mlp")
