"""Whole distributed attention: several processes of this machine share one sequence.

usp bench ring --quick
usp bench ring --seq-len 16384 --mesh 2x2 1x4 4x1 --json ring.json
usp bench ring --masks causal documents --heads 32 --kv-heads 8 --head-dim 128

usp on each mesh (ulysses x ring) stands beside one process with all cores, a ring written with
torch alone, and the rings and exchanges of others as far as they can be imported
(axolotl-ringmaster, ring-attention-pytorch, DeepSpeed-Ulysses), in the very same processes. They
run in turn, in both orders, a barrier before each call; the slowest rank counts. Nothing is timed
whose error against fp64 is too large, or where usp sends another number of bytes than its formula
says. Processes keep to --cores of the machine; with a GPU for each they run there, over NCCL or
RCCL.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator, Sequence

from usp.bench import world as worlds
from usp.bench.case import MASKS, Case
from usp.bench.device import DTYPES, default_device
from usp.bench.exact import judged_by, wrong
from usp.bench.options import add_dtypes, dtypes, parse, parser, whole
from usp.bench.peers import PEERS, present
from usp.bench.program import run_in_processes
from usp.bench.records import Record, not_timed, time_records
from usp.bench.ring_case import RingAttention, name_of
from usp.bench.show import stream_of
from usp.bench.world import World
from usp.distributed.processes import Tell
from usp.planning.layout import LAYOUTS
from usp.planning.route import TRANSPORTS

PASSES = ("forward", "both")
Mesh = tuple[int, int]


def mesh_shape(text: str) -> Mesh:
    """ "2x4" as (2, 4)."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None or 0 in (int(found[1]), int(found[2])):
        raise argparse.ArgumentTypeError(f"{text!r} is no ULYSSESxRING, as 2x4")
    return int(found[1]), int(found[2])


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Checked; ``processes`` is what every mesh has."""
    made = parser("ring", __doc__)
    add = made.add_argument
    add("--mesh", nargs="+", type=mesh_shape, default=[(2, 2), (1, 4), (4, 1)], metavar="UxR")
    add("--seq-len", type=whole, default=4096)
    add("--batch", type=whole, default=1)
    add("--heads", type=whole, default=8)
    add("--kv-heads", type=whole, help="by default as many as --heads")
    add("--head-dim", type=whole, default=64)
    add("--masks", nargs="+", choices=MASKS, default=["full", "causal"])
    add("--window", type=whole, default=1024, help="keys that a query sees with the mask window")
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="both: with backward")
    add(
        "--layout",
        choices=tuple(LAYOUTS),
        help="by default contiguous for full attention, else zigzag",
    )
    on_one_ring = [each for each in TRANSPORTS if each != "grid"]
    add("--transport", default="auto", choices=on_one_ring)
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    add("--cores", type=whole, help="that all processes share (default: all)")
    add_dtypes(made)
    args = parse(made, argv, seq_len=256, heads=4, window=64)
    args.kv_heads = args.kv_heads or args.heads
    sizes = {u * r for u, r in args.mesh}
    if len(sizes) > 1:
        made.error(f"meshes of one run have one size, --mesh has {sorted(sizes)} processes")
    if args.heads % args.kv_heads:
        made.error(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}")
    (args.processes,) = sizes
    return args


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    args.device = args.device or default_device()
    args.dtypes = dtypes(args)
    for name, why in present(args.peers)[1].items():
        print(f"left out: {name}: {why}", file=stream_of(args.json))
    every = len(list(cases(args))) * len(args.passes)
    return run_in_processes("ring", args, measure_all, every)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for dtype, mask in itertools.product(args.dtypes, args.masks):
        heads = args.heads, args.kv_heads, args.head_dim
        yield Case(dtype, args.batch, args.seq_len, *heads, mask, args.window)


def measure_all(world: World, rank: int, tell: Tell) -> None:
    """On each process: every case."""
    with worlds.joined(world, rank):
        measure_cases(world, tell)


def measure_cases(world: World, tell: Tell) -> None:
    """Every case, on every rank."""
    args = world.args
    peers, _ = present(args.peers)
    meshes = {name_of(shape): worlds.mesh(shape, world.device) for shape in args.mesh}
    for case in cases(args):
        tell(f"{case}: checked against fp64")
        attention = RingAttention(case, meshes, peers, world)
        errors, failed = worlds.everyone(attention.judged())[0]
        for which in args.passes:
            refused = wrong(errors, DTYPES[case.dtype], which)
            tell(f"{case}, {which}")
            tell(measure(attention, which, errors, failed, refused, args))


def measure(
    attention: RingAttention,
    which: str,
    errors: dict[str, dict[str, float]],
    failed: dict[str, str],
    refused: dict[str, str],
    args: argparse.Namespace,
) -> list[Record]:
    """Candidates in turn, their bytes counted."""
    out = {**attention.reasons, **failed, **refused}
    candidates = {n: attention.candidate(n, which) for n in attention.names if n not in out}
    sent = {name: attention.counted(name, run, which) for name, run in candidates.items()}
    for name, (count, formula) in sent.items():
        if formula is not None and count != formula:
            out[name] = f"a rank sends {count} bytes, the formula says {formula}"
            refused = refused | {name: out[name]}
            del candidates[name]
    times = worlds.turns(dict(candidates), args.rounds, args.seconds)
    case = attention.case
    named = case.named() | {"processes": attention.world.size, "layout": attention.layout}
    flops = case.flops(which)
    more = {
        name: {
            "bytes_sent": sent[name][0],
            "flops_per_s": flops / times.median(name),
            "errors": judged_by(errors.get(name, {}), which),
        }
        for name in candidates
    }
    return [*time_records(which, named, times, more=more), *not_timed(which, named, out, refused)]
