"""Attention in chunks of tokens and of heads: peak memory and time, beside the same at once.

usp bench chunks --quick
usp bench chunks --mesh 4x1 --seq-len 8192 --chunks 2 4 8 --offload --json chunks.json

Processes of this machine share one attention. Each way is checked against fp64, and its bytes on
the wire, which do not depend on chunks, against the formula. The peak is what a rank makes at a
time beyond its inputs, of the rank with most: on a CPU storages are counted one by one
(usp.testing.StorageBytes), on a GPU it is what torch's allocator says. With --offload there are
also ways whose keys, values and saved tensors wait in the memory of the host; on a CPU they are
there anyway, and the figures are the same. The ways run in turn, in both orders, a barrier before
each; the slowest rank counts.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import usp
from usp.bench import world as worlds
from usp.bench.case import MASKS, Case
from usp.bench.device import DTYPES
from usp.bench.exact import wrong
from usp.bench.memory import peak_bytes, value
from usp.bench.options import add_dtypes, dtypes, parse, parser, whole
from usp.bench.program import run_in_processes
from usp.bench.records import Record, not_timed, time_records
from usp.bench.ring import mesh_shape
from usp.bench.ring_case import Attend, RingAttention
from usp.bench.world import World
from usp.distributed.processes import Tell
from usp.planning.layout import LAYOUTS

PLAIN = "usp at once"
WHAT = ("memory", "time")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    made = parser("chunks", __doc__)
    add = made.add_argument
    add("--mesh", type=mesh_shape, default=(2, 1), metavar="UxR")
    add("--seq-len", type=whole, default=4096)
    add("--batch", type=whole, default=1)
    add("--heads", type=whole, default=8)
    add("--kv-heads", type=whole, default=4)
    add("--head-dim", type=whole, default=64)
    add("--masks", nargs="+", choices=MASKS[:2], default=["causal"])
    add("--chunks", nargs="*", type=whole, default=[2, 4, 8], help="of tokens")
    add("--head-chunks", nargs="*", type=whole, default=[2], help="of heads")
    add("--offload", action="store_true", help="and each way with offload='cpu'")
    add("--what", nargs="+", choices=WHAT, default=list(WHAT))
    add(
        "--layout",
        choices=tuple(LAYOUTS),
        help="by default contiguous for full attention, else zigzag",
    )
    add("--cores", type=whole, help="that all processes share (default: all)")
    add_dtypes(made)
    args = parse(made, argv, seq_len=256, head_dim=16)
    if args.heads % args.kv_heads:
        made.error(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}")
    args.processes = args.mesh[0] * args.mesh[1]
    args.transport = "ring"  # with chunks it is keys that move: so they do without
    return args


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    args.dtypes = dtypes(args)
    return run_in_processes("chunks", args, measure_all, len(list(cases(args))))


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for dtype, mask in itertools.product(args.dtypes, args.masks):
        yield Case(dtype, args.batch, args.seq_len, args.heads, args.kv_heads, args.head_dim, mask)


def ways(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Options by name."""
    found: dict[str, dict[str, Any]] = {PLAIN: {}}
    found |= {f"usp {n} chunks": {"chunks": n} for n in args.chunks}
    found |= {f"usp {n} chunks of heads": {"head_chunks": n} for n in args.head_chunks}
    if args.offload:
        found |= {f"{name}, offload": {**way, "offload": "cpu"} for name, way in found.items()}
    return found


class ChunkedAttention(RingAttention):
    """One rank's view of a case, in each of the ways."""

    def __init__(self, case: Case, mesh: usp.SequenceMesh, world: World) -> None:
        self.ways = ways(world.args)
        super().__init__(case, dict.fromkeys(self.ways, mesh), [], world)
        self.names = list(self.ways)

    def _prepared(self, name: str) -> tuple[Attend, list[Any]]:
        attend, shard = super()._prepared(name)
        if isinstance(attend, usp.LongContextAttention):
            attend.options |= self.ways[name]
        return attend, shard


def least_peak(run: Callable[[], object], device: str) -> int:
    """Of this rank. A thread of gloo may hold a message for a moment: the least of some counts."""
    return min(peak_bytes(run, device) for _ in range(7))


def measure_all(world: World, rank: int, tell: Tell) -> None:
    """On each process: every case."""
    with worlds.joined(world, rank):
        measure_cases(world, tell)


def measure_cases(world: World, tell: Tell) -> None:
    """Every case, on every rank."""
    mesh = worlds.mesh(world.args.mesh, world.device)
    for case in cases(world.args):
        tell(str(case))
        attention = ChunkedAttention(case, mesh, world)
        errors, failed = worlds.everyone(attention.judged())[0]
        refused = wrong(errors, DTYPES[case.dtype])
        found = [
            measure(attention, which, errors, failed, refused) for which in ("forward", "both")
        ]
        tell(list(itertools.chain(*found)))


def measure(
    attention: ChunkedAttention,
    which: str,
    errors: dict[str, dict[str, float]],
    failed: dict[str, str],
    refused: dict[str, str],
) -> list[Record]:
    """The ways in turn, each with its peak and its bytes."""
    args, case, out = attention.world.args, attention.case, {**failed, **refused}
    runs = {name: attention.candidate(name, which) for name in attention.names if name not in out}
    sent = {name: attention.counted(name, run, which) for name, run in runs.items()}
    for name, (count, formula) in sent.items():
        if count != formula:
            out[name] = f"a rank sends {count} bytes, the formula says {formula}"
            refused = refused | {name: out[name]}
            del runs[name]
    named = case.named() | {"mesh": "{} x {}".format(*args.mesh), "layout": attention.layout}
    found: list[Record] = []
    if "memory" in args.what:
        peaks = {
            name: max(worlds.everyone(least_peak(run, attention.world.device)))
            for name, run in runs.items()
        }
        for name, peak in peaks.items():
            values = {"peak_bytes": peak, "of_plain": peak / peaks.get(PLAIN, peak)}
            values["bytes_sent"] = sent[name][0]
            found.append(value(f"peak, {which}", named, name, values))
    if "time" in args.what:
        times = worlds.turns(dict(runs), args.rounds, args.seconds)
        found += time_records(which, named, times)
    return [*found, *not_timed(which, named, out, refused)]
