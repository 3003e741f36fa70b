"""Four processes on two cores against one process, and against a ring of plain torch.

usp bench cpu_ring --quick
usp bench cpu_ring --json result.json        (16384 tokens, 8 heads: about 20 minutes)
usp bench cpu_ring --trace timeline.png      (draws when rank 0 to 3 compute and communicate)

Four gloo processes of one thread each compute one attention with LongContextAttention on every
mesh (ulysses x ring), against (a) the same call in one process with two threads, and (b) a plain
ring of four: torch's partial (out, lse) of each block, merged in Python (_plain_ring.py). Causal
sequences lie in zigzag order. Candidates run in turn, a barrier before each; the slowest rank
counts, and a ratio is the median over rounds of time(other) / time(usp), above 1 where usp is
faster. Nothing is timed where an error against fp64 at sampled positions is too large.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _attention_case import PASSES
from _measure import Times, introduce, take_turns, write_report
from _ring_case import ALLOWED, ALONE, MESHES, PLAIN, PROCESSES, RingAttention, RingCase

import usp
from usp.demo.processes import ProcessFailed, Tell, run


@dataclass(frozen=True)
class Work:
    """What all processes are given."""

    args: argparse.Namespace
    store: str


def join(store: str, rank: int) -> dict[str, usp.SequenceMesh]:
    """Meets the other processes; the meshes, by name."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, PROCESSES),
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(minutes=30),
    )
    return {name: usp.init_mesh(*d, device_type="cpu") for name, d in MESHES.items()}


def slowest_seconds(run: Callable[[], object]) -> float:
    """What a call took that all ranks begin together, on the slowest of them."""
    dist.barrier()
    start = time.perf_counter()
    run()
    taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


def as_first_rank_says(wish: bool) -> bool:
    said = torch.tensor(wish)
    dist.broadcast(said, 0)
    return bool(said)


def check(case: RingCase, errors: dict[str, dict[str, float]]) -> None:
    for name, found in errors.items():
        for tensor, error in found.items():
            if not error <= ALLOWED[case.dtype]:
                raise ValueError(
                    f"{case}: {tensor} of {name} is off by {error:.2e}, more than "
                    f"{ALLOWED[case.dtype]:.0e}: not timed"
                )


def measure_all(work: Work, rank: int, tell: Tell) -> list[dict[str, Any]]:
    """On each process: every case; the results of rank 0 are those of all."""
    args, meshes = work.args, join(work.store, rank)
    meshes = {name: meshes[name] for name in args.meshes}
    results = []
    for dtype, mask in itertools.product(args.dtypes, args.masks):
        case = RingCase(dtype, args.head_dim, args.seq_len, mask, args.heads)
        attention = RingAttention(case, meshes)
        errors = attention.errors()
        check(case, errors)
        for which in args.passes:
            candidates = attention.candidates(which)
            times = take_turns(
                candidates, args.rounds, args.seconds, slowest_seconds, as_first_rank_says
            )
            results.append(result(case, which, list(meshes), times, errors))
            if rank == 0:
                print_rows(results[-1])
    dist.destroy_process_group()
    return results


def result(
    case: RingCase, which: str, meshes: list[str], times: Times, errors: dict[str, dict[str, float]]
) -> dict[str, Any]:
    return {
        **asdict(case),
        "pass": which,
        "ratios": {
            name: {other: times.ratio(other, name) for other in (ALONE, PLAIN)} for name in meshes
        },
        "bytes_sent": {
            name: sum(
                case.bytes_sent(MESHES[name], backward).total
                for backward in ((False,) if which == "forward" else (False, True))
            )
            for name in meshes
        },
        "errors": errors,
        "seconds": times.seconds,
        "median_seconds": {name: times.median(name) for name in times.seconds},
    }


def print_rows(result: dict[str, Any]) -> None:
    for name, seconds in result["median_seconds"].items():
        errors = result["errors"][name].values()
        line = f"{result['dtype']:6}{result['mask']:8}{result['pass']:9}{name:13}{seconds:8.3f}"
        if name in result["ratios"]:
            ratios, sent = result["ratios"][name], result["bytes_sent"][name]
            line += f"{ratios[ALONE]:10.2f}{ratios[PLAIN]:10.2f}{sent / 1e6:10.1f}"
        else:
            line += " " * 30
        print(line + "   " + " ".join(f"{error:.1e}" for error in errors), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seq-len", type=int, default=16384)
    add("--heads", type=int, default=8)
    add("--head-dim", type=int, default=64)
    add("--dtypes", nargs="+", choices=ALLOWED, default=["bf16", "fp32"])
    add("--masks", nargs="+", choices=("full", "causal"), default=["full", "causal"])
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="both: with backward")
    add("--meshes", nargs="+", choices=MESHES, default=list(MESHES), help="ulysses x ring")
    add("--rounds", type=int, default=7, help="of each case, at most")
    add("--seconds", type=float, default=120.0, help="after which a case gets no further round")
    add("--quick", action="store_true", help="2048 tokens, 3 rounds")
    add("--json", type=Path, help="write every time taken there")
    add("--trace", type=Path, metavar="FILE.png", help="time nothing, draw one pass of 1 x 4")
    args = parser.parse_args()
    if args.quick:
        args.seq_len, args.rounds = 2048, 3
    if args.seq_len % (2 * PROCESSES):
        parser.error(
            f"--seq-len must be a multiple of {2 * PROCESSES}, got {args.seq_len}: the plain ring "
            "cuts it evenly"
        )
    return args


def in_processes(function: Callable[..., Any], args: argparse.Namespace) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="usp-bench-") as folder:
        try:
            return run(function, Work(args, f"{folder}/store"), PROCESSES, lambda done, total: None)
        except ProcessFailed as failed:
            sys.exit(f"{failed.details}\n{failed}")


def main() -> None:
    args = parse()
    about = introduce()
    if args.trace is not None:
        return
    print(
        f"\n{args.seq_len} tokens, {args.heads} heads of {args.head_dim}; MB: that leave a rank\n"
        "dtype mask    pass     candidate     seconds  (a)/usp   (b)/usp        MB"
        "   errors of out dq dk dv"
    )
    results = in_processes(measure_all, args)[0]
    write_report(args.json, about, cases=results)


if __name__ == "__main__":
    main()
