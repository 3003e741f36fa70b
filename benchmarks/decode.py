"""Decoding over keys that four processes share: usp.decode_attention against gathering the keys.

usp bench decode --quick
usp bench decode --json result.json          (contexts of 4096, 16384 and 65536 tokens)

Four gloo processes of one thread each, on two cores; each holds a quarter of the keys and values.
One query of every sample attends to all of them, two ways: usp attends to its own quarter and
merges (out, lse) on all ranks; "gathered" all-gathers keys and values and calls torch's attention,
as plain torch would. They run in turn in both orders, a barrier before each; the slowest rank
counts. A ratio is the median over rounds of time(gathered) / time(usp). The bytes are those that
usp.testing.WireBytes counts. Nothing is timed where usp's are not the formula's, or where a result
differs from fp64 on one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import usp
from usp.bench import world as worlds
from usp.bench.device import DTYPES
from usp.bench.exact import relative_error
from usp.bench.machine import introduce
from usp.bench.records import write_report
from usp.bench.world import World
from usp.distributed.processes import Tell
from usp.planning.cost import Place, Shape, bytes_sent
from usp.planning.layout import Replicated
from usp.testing import WireBytes

MESH, PROCESSES, CORES = (1, 4), 4, 2  # ulysses x ring
# Relative rms error against fp64 above which nothing is timed.
ALLOWED = {"fp32": 1e-5, "bf16": 2e-2}


@dataclass(frozen=True)
class DecodeCase:
    """Sizes of one decoding step; ``context`` is a multiple of the processes."""

    dtype: str
    context: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int

    def bytes_sent(self, mesh: usp.SequenceMesh) -> int:
        """By this rank, as usp's formula says."""
        dims = (self.head_dim,) * 2
        sizes = (self.batch, 1, self.context, self.heads, self.kv_heads)
        place = Place(mesh.ring_degree, 1, mesh.ring_rank, 0, (Replicated(1), "contiguous"))
        return bytes_sent(Shape(*sizes, *dims, DTYPES[self.dtype]), place).total


def measure_all(world: World, rank: int, tell: Tell) -> list[dict[str, Any]]:
    """On each process: every case; the results of rank 0 are those of all."""
    with worlds.joined(world, rank):
        return measure(world.args, worlds.mesh(MESH, "cpu"))


def measure(args: argparse.Namespace, mesh: usp.SequenceMesh) -> list[dict[str, Any]]:
    results = []
    for dtype in args.dtypes:
        for context in args.contexts:
            case = DecodeCase(dtype, context, args.batch, *args.heads, args.head_dim)
            results.append(measured(case, args, mesh))
            if dist.get_rank() == 0:
                print_row(results[-1])
    return results


def measured(case: DecodeCase, args: argparse.Namespace, mesh: usp.SequenceMesh) -> dict[str, Any]:
    ways, exact = candidates(case, mesh)
    found = {name: relative_error(way(), exact) for name, way in ways.items()}
    check(case, found)
    sent = {}
    for name, way in ways.items():
        with WireBytes() as wire:
            way()
        sent[name] = wire.sent
    if sent["usp"] != case.bytes_sent(mesh):
        raise ValueError(
            f"rank {mesh.rank} sends {sent['usp']} bytes, the formula says "
            f"{case.bytes_sent(mesh)}: not timed"
        )
    times = worlds.turns(ways, args.rounds, args.seconds)
    return {
        **asdict(case),
        "bytes_sent": sent,
        "ratio": times.ratio("gathered", "usp"),
        "errors": found,
        "seconds": times.seconds,
        "median_seconds": {name: times.median(name) for name in ways},
    }


def candidates(
    case: DecodeCase, mesh: usp.SequenceMesh
) -> tuple[dict[str, Callable[[], Tensor]], Tensor]:
    """Both ways, and (B, 1, H, D) in fp64."""
    torch.manual_seed(0)
    dtype, shape = DTYPES[case.dtype], (case.batch, case.context, case.kv_heads, case.head_dim)
    q = torch.randn(case.batch, 1, case.heads, case.head_dim).to(dtype)
    k, v = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    exact = plain(*(x.double() for x in (q, k, v)))
    cache = usp.ShardedCache(mesh)
    own = [x.chunk(mesh.size, 1)[mesh.rank].contiguous() for x in (k, v)]
    cache.extend(*own, seq_len=case.context)

    def gathered() -> Tensor:
        whole = []
        for x in own:
            parts = [torch.empty_like(x) for _ in range(mesh.size)]
            dist.all_gather(parts, x)
            whole.append(torch.cat(parts, 1))
        return plain(q, *whole)

    ways = {
        "usp": lambda: usp.decode_attention(q, cache, mesh, validate=False),
        "gathered": gathered,
    }
    return ways, exact


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def check(case: DecodeCase, errors: dict[str, float]) -> None:
    for name, error in errors.items():
        if not error <= ALLOWED[case.dtype]:
            raise ValueError(
                f"{case}: {name} is off by {error:.2e}, more than {ALLOWED[case.dtype]:.0e}: not "
                "timed"
            )


def print_row(result: dict[str, Any]) -> None:
    median, sent = result["median_seconds"], result["bytes_sent"]
    line = f"{result['dtype']:6}{result['context']:8}"
    for name in ("usp", "gathered"):
        line += f"{1e3 * median[name]:12.2f}{sent[name] / 1e6:12.4f}"
    print(f"{line}{result['ratio']:10.2f}", flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--contexts", type=int, nargs="+", default=[4096, 16384, 65536], help="tokens cached")
    add("--batch", type=int, default=1)
    add("--heads", type=int, nargs=2, default=[32, 8], help="of queries and of keys")
    add("--head-dim", type=int, default=128)
    add("--dtypes", nargs="+", choices=ALLOWED, default=["fp32", "bf16"])
    add("--rounds", type=int, default=9, help="of each case, at most")
    add("--seconds", type=float, default=60.0, help="after which a case gets no further round")
    add("--quick", action="store_true", help="4096 tokens, 3 rounds")
    add("--json", type=Path, help="write every time taken there")
    args = parser.parse_args(argv)
    args.device, args.cores = "cpu", CORES
    if args.quick:
        args.contexts, args.rounds = [4096], 3
    uneven = [n for n in args.contexts if n % PROCESSES]
    if uneven:
        parser.error(f"--contexts {uneven[0]} does not divide by {PROCESSES} processes")
    if args.heads[0] % args.heads[1]:
        parser.error(f"--heads {args.heads[0]} is no multiple of {args.heads[1]}")
    return args


def main() -> None:
    args = parse()
    about = introduce("decode")
    print(
        f"\n{args.batch} sample(s), {args.heads[0]} heads, {args.heads[1]} of keys, of "
        f"{args.head_dim}; ms of a step, and MB that leave rank 0\n"
        "dtype context      usp ms      usp MB gathered ms gathered MB  time/usp"
    )
    results = worlds.in_processes(measure_all, args, PROCESSES)[0]
    write_report(args.json, about, cases=results)


if __name__ == "__main__":
    main()
