"""Four processes on two cores against one process, and against a ring of plain torch.

usp bench cpu_ring --quick
usp bench cpu_ring --json result.json        (16384 tokens, 8 heads)
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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _timeline
import torch.distributed as dist
from _attention_case import PASSES
from _measure import Times, introduce, refuse_inexact, take_turns, write_report
from _ring_case import ALLOWED, ALONE, CORES, MESHES, PLAIN, PROCESSES, RingAttention, RingCase
from _ring_processes import Work, as_first_rank_says, in_processes, join, slowest_seconds

import usp
from usp.distributed.processes import Tell

TRACED = "1 x 4"


def check(case: RingCase, errors: dict[str, dict[str, float]]) -> None:
    refuse_inexact(case, errors, ALLOWED[case.dtype])


def measure_all(work: Work, rank: int, tell: Tell) -> list[dict[str, Any]]:
    """On each process: every case; the results of rank 0 are those of all."""
    results = measure(work.args, join(work, rank))
    dist.destroy_process_group()
    return results


def measure(args: argparse.Namespace, meshes: dict[str, usp.SequenceMesh]) -> list[dict[str, Any]]:
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
            if dist.get_rank() == 0:
                print_rows(results[-1])
    return results


def trace(work: Work, rank: int, tell: Tell) -> tuple[_timeline.Timeline, float]:
    """On each process: one forward and backward of the traced mesh; its messages' time alone."""
    args, mesh = work.args, join(work, rank)[TRACED]
    case = RingCase(args.dtypes[0], args.head_dim, args.seq_len, args.masks[0], args.heads)
    attention = RingAttention(case, {TRACED: mesh})
    check(case, attention.errors())
    run = attention.candidates("both")[TRACED]
    blocks = case.bytes_sent(MESHES[TRACED], backward=False).blocks
    for _ in range(3):  # the last one counts
        dist.barrier()
        with _timeline.recorded(blocks // (PROCESSES - 1)) as timeline:
            run()
    alone = _timeline.seconds_alone(mesh.ring, timeline.messages)
    dist.destroy_process_group()
    return timeline, alone


def report_trace(args: argparse.Namespace) -> dict[str, Any]:
    args.meshes = [TRACED]
    timelines, alone = zip(*in_processes(trace, args), strict=True)
    milliseconds = [
        {
            "pass": 1e3 * (t.ends[1] - t.ends[0]),
            "computing": 1e3 * _timeline.total(t.computing),
            "in_flight": 1e3 * _timeline.total(t.in_flight),
            "hidden": 1e3 * _timeline.common(t.in_flight, t.computing),
            "waiting": 1e3 * _timeline.total(t.waiting),
            "messages_alone": 1e3 * seconds,
        }
        for t, seconds in zip(timelines, alone, strict=True)
    ]
    share = _timeline.hidden_share(list(timelines))
    print("\nmilliseconds   pass  computing  in flight  hidden  waiting  messages alone")
    for rank, row in enumerate(milliseconds):
        widths = zip(row.values(), (10, 11, 11, 8, 9, 16), strict=True)
        print(f"rank {rank:4}" + "".join(f"{value:{width}.1f}" for value, width in widths))
    print(f"{100 * share:.1f} % of the time that messages are in flight, their rank computes")
    _timeline.draw(
        list(timelines),
        f"Forward and backward of a ring of {PROCESSES}: {PROCESSES} processes on {CORES} cores, "
        f"{args.seq_len} tokens, {args.heads} heads of {args.head_dim}, {args.dtypes[0]}, "
        f"{args.masks[0]}\n{100 * share:.0f} % of the time that messages are in flight is hidden "
        "under computation",
        args.trace,
    )
    return {"hidden_share": share, "milliseconds": milliseconds}


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


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
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
    args = parser.parse_args(argv)
    if args.quick:
        args.seq_len, args.rounds = 2048, 3
    if args.seq_len % (2 * PROCESSES):
        parser.error(
            f"--seq-len must be a multiple of {2 * PROCESSES}, got {args.seq_len}: the plain ring "
            "cuts it evenly"
        )
    return args


def main() -> None:
    args = parse()
    about = introduce()
    if args.trace is not None:
        write_report(args.json, about, trace=report_trace(args))
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
