"""Every short length and every head dim: where usp on the CPU is slower than torch's attention.

usp bench cpu_sweep --quick
usp bench cpu_sweep --json result.json --plot sweep.png    (all 600 lengths)
usp bench cpu_sweep --quick --threads 1 --clock cpu        (a machine that others use too)

time(usp) / time(SDPA) of lengths 1 to 600 at head dim 64, and of head dims 16 to 256 at 512 tokens;
batches of 4096 tokens, 4 heads, full attention, through the public functions; candidates in turn,
the median over rounds of ratios within one. A point more than 10 % above 1 is measured again with
four times the rounds before it counts. A case is not timed if its error against fp64 is above 1.25
times SDPA's. The exit code is the number of points that stay above and of cases not timed, at most
100.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from usp.backends import native
from usp.bench.attention import Own, Problem
from usp.bench.case import Case
from usp.bench.device import DTYPES
from usp.bench.exact import WrongResult, wrong
from usp.bench.machine import introduce
from usp.bench.records import write_report
from usp.bench.ring_case import differentiated
from usp.bench.rivals import sdpa
from usp.bench.timing import CLOCKS, Times, interleave

PASSES = ("forward", "both")
TOKENS = 4096  # of a call at least: short sequences come in batches
HEADS, HEAD_DIM, LENGTH = 4, 64, 512
ALLOWED = 1.1
MORE_ROUNDS = 4
SAMPLE_SECONDS = 1e-3  # shorter calls are repeated within a sample
SWEEPS = {"length": f"tokens, at head dim {HEAD_DIM}", "head_dim": f"head dim, at {LENGTH} tokens"}


def repeats_for(calls: dict[str, Callable[[], object]]) -> int:
    """How often to call each of them so that a sample of either is long enough."""
    shortest = math.inf
    for call in calls.values():
        call()
        start = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - start)
    return max(1, math.ceil(SAMPLE_SECONDS / shortest))


def in_turn(problem: Problem, which: str, rounds: int, args: argparse.Namespace) -> Times:
    calls = {
        name.removesuffix(" native"): partial(
            differentiated, attend, problem.leaves, problem.dout, which
        )
        for name, attend in problem.candidates.items()
    }
    repeats = repeats_for(calls)

    def repeated(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(repeats):
                call()

        return run

    candidates = {name: repeated(call) for name, call in calls.items()}
    times = interleave(candidates, rounds, args.seconds * rounds / args.rounds, args.clock)
    return Times({name: [s / repeats for s in taken] for name, taken in times.seconds.items()})


def measure(sweep: str, case: Case, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One result for each pass."""
    problem = Problem(case, "cpu", {"usp native": Own(native)}, {"sdpa": sdpa(case, "cpu")})
    errors = {name: problem.errors(name) for name in problem.candidates}
    off = wrong(errors, DTYPES[case.dtype]).get("usp native")
    if off is not None:
        raise WrongResult(f"{case}: {off}: not timed")
    for which in args.passes:
        times = in_turn(problem, which, args.rounds, args)
        if times.ratio("usp", "sdpa") > ALLOWED:
            times = in_turn(problem, which, MORE_ROUNDS * args.rounds, args)
        yield {
            **asdict(case),
            "sweep": sweep,
            "pass": which,
            "usp_over_sdpa": times.ratio("usp", "sdpa"),
            "median_seconds": {name: times.median(name) for name in times.seconds},
            "rounds": len(times.seconds["usp"]),
        }


def cases(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    for dtype in args.dtypes:
        for length in range(*args.lengths):
            yield "length", case_of(dtype, length, HEAD_DIM)
        for head_dim in sorted(args.head_dims):
            yield "head_dim", case_of(dtype, LENGTH, head_dim)


def case_of(dtype: str, length: int, head_dim: int) -> Case:
    return Case(dtype, TOKENS // length, length, HEADS, HEADS, head_dim, "full")


def line(result: dict[str, Any]) -> str:
    times = result["median_seconds"]
    return (
        f"{result['dtype']:6}{result['length']:6}{result['head_dim']:9}  {result['pass']:8}"
        f"{1e3 * times['usp']:10.3f}{1e3 * times['sdpa']:10.3f}{result['usp_over_sdpa']:12.2f}"
        f"{result['rounds']:8}"
    )


HEAD = "dtype length head_dim  pass      usp, ms  SDPA, ms    usp/SDPA  rounds"


def report(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints each sweep's range, and the points that are too slow; these are returned."""
    key = ("sweep", "dtype", "pass")
    print("\ntime(usp) / time(SDPA)        points   median     worst  at")
    for names in dict.fromkeys(tuple(r[k] for k in key) for r in results):
        group = [r for r in results if tuple(r[k] for k in key) == names]
        worst = max(group, key=lambda r: r["usp_over_sdpa"])
        median = statistics.median(r["usp_over_sdpa"] for r in group)
        sweep, dtype, which = names
        print(
            f"  {sweep:9} {dtype:5} {which:10}{len(group):8}{median:9.2f}"
            f"{worst['usp_over_sdpa']:10.2f}  {worst[sweep]}"
        )
    slow = [r for r in results if r["usp_over_sdpa"] > ALLOWED]
    print(f"\n{len(slow)} of {len(results)} points are more than 10 % slower than SDPA")
    if slow:
        print("\n".join([HEAD, *map(line, slow)]))
    return slow


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """One panel a sweep, one curve a dtype and pass."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, len(SWEEPS), sharey=True)
    styles = {"forward": "-", "both": "--"}
    names = {"forward": "forward", "both": "forward and backward"}
    colours = {"bf16": "#0072b2", "fp32": "#d55e00"}
    for panel, (sweep, label) in zip(panels, SWEEPS.items(), strict=True):
        found = [r for r in results if r["sweep"] == sweep]
        for dtype, which in itertools.product(colours, styles):
            points = [r for r in found if (r["dtype"], r["pass"]) == (dtype, which)]
            panel.plot(
                [r[sweep] for r in points],
                [r["usp_over_sdpa"] for r in points],
                styles[which],
                color=colours[dtype],
                linewidth=1,
                label=f"{dtype}, {names[which]}",
            )
        panel.axhline(1, color="0.3", linewidth=0.8)
        panel.set_xlabel(label)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(axis="y", color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time(usp) / time(SDPA): below 1, usp is faster")
    panels[1].legend(frameon=False)
    figure.suptitle(f"Full attention on CPU, batches of {TOKENS} tokens, {HEADS} heads")
    figure.savefig(file, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    every = (1, 601, 1)
    add("--lengths", nargs=3, type=int, default=every, metavar=("START", "STOP", "STEP"))
    add("--head-dims", nargs="*", type=int, default=[*range(16, 257, 8), 17, 33, 67, 100, 255])
    add("--dtypes", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="both: with backward")
    add("--rounds", type=int, default=15, help="of each point, at most")
    add("--seconds", type=float, default=1.0, help="after which a point gets no further round")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--clock", choices=CLOCKS, default="wall", help="cpu: on a busy machine, with --threads 1")
    add("--quick", action="store_true", help="7 lengths, 3 head dims, 5 rounds")
    add("--json", type=Path, help="write every point there")
    add("--plot", type=Path, metavar="FILE.png", help="draw the ratios (needs matplotlib)")
    args = parser.parse_args()
    if args.quick:
        args.lengths, args.head_dims, args.rounds = (1, 600, 97), [16, 33, 128], 5
    return args


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    about = introduce("cpu_sweep", clock=args.clock)
    print(f"\nbatches of {TOKENS} tokens, {HEADS} heads\n{HEAD}")
    results: list[dict[str, Any]] = []
    refused: list[str] = []
    for sweep, case in cases(args):
        try:
            for result in measure(sweep, case, args):
                results.append(result)
                print(line(result), flush=True)
        except WrongResult as found:
            refused.append(str(found))
            print(found, flush=True)
    slow = report(results)
    print("\n".join(refused))
    write_report(args.json, about, points=results, left_out=[{"why": why} for why in refused])
    if args.plot is not None:
        draw(results, args.plot)
    return min(len(slow) + len(refused), 100)


if __name__ == "__main__":
    sys.exit(main())
