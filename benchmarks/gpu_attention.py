"""GPU kernels against torch's, FlexAttention and flash-attn; ring steps; rings of virtual ranks.

make bench-gpu
usp bench gpu_attention --json result.json
usp bench gpu_attention --dry-run            (no GPU: Triton's interpreter, tiny sizes, no meaning)

Candidates run in turn in one process; a ratio is the median over rounds of time(rival) / time(usp),
above 1 where usp is faster. TFLOP/s count 4 D of a visible pair forward and 10 D backward, causal
halves; the matrix peak is torch's own product in the same dtype in the same run. A candidate
whose out and dq are off by more than 3 times the error of the best, against fp64 on sampled rows,
is not timed, and usp above 1.25 times the rivals' best ends the run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _attention_case import DTYPES
from _gpu_case import MASKS, Case, Problem
from _gpu_ring import LIBRARIES, RingStep, VirtualRing, eager_merge, fused_merge, on_cpu
from _measure import Times, environment, interleave
from torch import Tensor

LENGTHS = (8192, 1024, 2048, 4096, 16384, 32768, 65536)
HEAD_DIMS = (128, 64, 256)
PASSES = ("forward", "backward")
RING_LENGTHS = (1024, 2048, 4096, 8192)


class Budget:
    """Seconds of the whole run; what does not fit is left out and said."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.left_out: list[str] = []

    def allows(self, what: str) -> bool:
        if time.monotonic() < self._end:
            return True
        self.left_out.append(what)
        return False


def repeated(run: Callable[[], Any], device: str) -> tuple[Callable[[], Any], int]:
    """Calls enough for 5 ms, so that waiting for the device does not count."""
    run()
    start = clock(device)
    run()
    count = max(1, min(200, int(5e-3 / max(clock(device) - start, 1e-6))))

    def many() -> None:
        for _ in range(count):
            run()

    return (many, count) if device == "cuda" else (run, 1)


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(runs: dict[str, Callable[[], Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of each, and ratios to usp."""
    many = {name: repeated(run, args.device) for name, run in runs.items()}
    name_of_clock = "gpu" if args.device == "cuda" else "wall"
    times = interleave({n: m[0] for n, m in many.items()}, args.rounds, args.seconds, name_of_clock)
    single = Times({n: [s / many[n][1] for s in all_] for n, all_ in times.seconds.items()})
    return {
        "seconds": {name: single.median(name) for name in runs},
        "ratios": {name: single.ratio(name, "usp") for name in runs if name != "usp"},
        "rounds": single.seconds,
    }


def errors(problem: Problem) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Relative rms error of out and dq of each candidate that runs; why the others do not."""
    length = problem.case.length
    rows = torch.randperm(length, device=problem.device)[:128]
    exact = problem.exact_rows(rows)
    found, failed = {}, {}
    for name in problem.candidates:
        try:
            results = problem.results(name)
        except Exception as error:  # a rival may not take this problem: say so and go on
            if name == "usp":
                raise
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        found[name] = {
            part: relative(results[part][-1, rows, -1].double(), reference)
            for part, reference in exact.items()
        }
    return found, failed


def relative(x: Tensor, reference: Tensor) -> float:
    return ((x - reference).square().mean() / reference.square().mean()).sqrt().item()


def checked(problem: Problem) -> tuple[list[str], dict[str, Any]]:
    """Names worth timing. Ends the run where usp is wrong."""
    found, failed = errors(problem)
    rivals = [e for name, e in found.items() if name != "usp"]
    floor = 16 * torch.finfo(torch.float32).eps
    for part in ("out", "dq"):
        best = min((e[part] for e in rivals), default=torch.finfo(problem.dout.dtype).eps)
        if not found["usp"][part] <= max(1.25 * best, floor):
            sys.exit(f"{problem.case}: usp's {part} is off by {found['usp'][part]:.2e}: not timed")
        for name in list(found):
            if not found[name][part] <= max(3 * best, floor):
                failed[name] = f"{part} is off by {found.pop(name)[part]:.2e}"
    return list(found), {"errors": found, "not_timed": failed}


def measure_local(case: Case, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    problem = Problem(case, args.device)
    names, about = checked(problem)
    for which in PASSES:
        result = timed({name: problem.run(name, which) for name in names}, args)
        tflops = {n: case.flops(which) / s / 1e12 for n, s in result["seconds"].items()}
        yield {**asdict(case), "pass": which, "tflops": tflops, **about, **result}


def measure_peak(dtype: str, args: argparse.Namespace) -> float:
    """TFLOP/s of torch's matrix product."""
    size = 8192 if args.device == "cuda" else 256
    a, b = (torch.randn(size, size, device=args.device).to(DTYPES[dtype]) for _ in range(2))
    result = timed({"usp": lambda: a @ b}, args)
    return 2.0 * size**3 / result["seconds"]["usp"] / 1e12


def measure_ring_step(length: int, args: argparse.Namespace) -> dict[str, Any]:
    """One step into a state that holds a block: usp, library + eager merge, library + ours."""
    heads, head_dim = (16, 128) if args.device == "cuda" else (2, 16)
    x = torch.randn(5, 1, length, heads, head_dim, device=args.device).to(DTYPES[args.dtypes[0]])
    step = RingStep(x[0], ((x[1], x[2]), (x[3], x[4])))
    expected = step.state()
    step.usp(expected)
    runs: dict[str, Callable[[], Any]] = {}
    held, fresh = step.state(), step.state()
    runs["usp"] = lambda: step.usp(held)
    for library, (name, merge) in itertools.product(
        args.libraries, (("eager merge", eager_merge), ("fused merge", fused_merge))
    ):
        call = args.libraries[library]
        trial = step.state()
        step.library(trial, call, merge)
        if not relative(trial.out.double(), expected.out.double()) <= 2e-2:
            sys.exit(f"ring step of {length}: {library} + {name} is not usp's result: not timed")
        runs[f"{library} + {name}"] = lambda c=call, m=merge: step.library(held, c, m)
    runs["usp without a state before"] = lambda: step.usp(
        type(fresh)(fresh.out, fresh.lse.fill_(-torch.inf))
    )
    return {"length": length, "heads": heads, "head_dim": head_dim, **timed(runs, args)}


def measure_ring(ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """All ranks of a causal zigzag ring in turn, and one call for the whole sequence."""
    local = 8192 if args.device == "cuda" else 16
    heads, head_dim = (8, 128) if args.device == "cuda" else (1, 16)
    shape = (3, 1, ranks * local, heads, head_dim)
    q, k, v = torch.randn(shape, device=args.device).to(DTYPES[args.dtypes[0]])
    ring = VirtualRing(ranks, q, k, v)
    shards = ring.shards()
    ours = ring.usp(shards)
    runs: dict[str, Callable[[], Any]] = {"usp": lambda: ring.usp(shards)}
    memory = {"usp": peak_memory(runs["usp"], args.device)}
    for name, call in args.libraries.items():
        theirs = ring.library(shards, call, eager_merge)
        for a, b in zip(ours, theirs, strict=True):
            if not relative(b.double(), a.double()) <= 2e-2:
                sys.exit(f"ring of {ranks}: {name} + eager merge is not usp's result: not timed")
        runs[name] = lambda c=call: ring.library(shards, c, eager_merge)
        memory[name] = peak_memory(runs[name], args.device)
    from usp import long_context_attention

    with torch.no_grad():
        runs["usp, one call"] = lambda: long_context_attention(
            q, k, v, causal=True, backend="triton"
        )
        result = timed(runs, args)
    efficiency = result["seconds"]["usp, one call"] / result["seconds"]["usp"]
    about = {"ranks": ranks, "local_length": local, "heads": heads, "head_dim": head_dim}
    return {**about, "efficiency": efficiency, "peak_bytes": memory, **result}


def peak_memory(run: Callable[[], Any], device: str) -> int:
    """Bytes allocated beyond what was there."""
    if device != "cuda":
        return 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Head dim 128 in bf16 first: what the budget cuts off is the rarest."""
    if args.dry_run:
        yield Case("fp16", 16, 32, "causal", tokens=64, width=32)
        yield Case("fp16", 16, 32, "gqa", tokens=32, width=128)
        return
    for dtype, head_dim, mask, length in itertools.product(
        args.dtypes, args.head_dims, MASKS, args.lengths
    ):
        if dtype == "bf16" or length == 8192:
            yield Case(dtype, head_dim, length, mask)


def device_facts(args: argparse.Namespace) -> dict[str, Any]:
    import triton

    facts: dict[str, Any] = {"triton": triton.__version__, "dry_run": args.dry_run}
    if args.device == "cuda":
        import subprocess

        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"], facts["hip"] = torch.version.cuda, torch.version.hip
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        except OSError:
            facts["driver"] = "unknown: no nvidia-smi"
    return facts


def print_local(result: dict[str, Any], peak: float) -> None:
    rates = "  ".join(f"{name} {rate:.0f}" for name, rate in result["tflops"].items())
    of_peak = 100 * result["tflops"]["usp"] / peak
    print(
        f"{result['dtype']} {result['head_dim']:4} {result['length']:6} {result['mask']:7}"
        f"{result['pass']:9} TFLOP/s: {rates}  ({of_peak:.0f} % of the product)",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=("bf16", "fp16"), default=["bf16", "fp16"])
    add("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    add("--lengths", nargs="+", type=int, default=list(LENGTHS))
    add("--rounds", type=int, default=9, help="of each case, at most")
    add("--seconds", type=float, default=0.5, help="after which a case gets no further round")
    add("--budget", type=float, default=440.0, help="seconds of the whole run")
    add("--json", type=Path, help="write every time taken there, and plots beside it")
    add("--dry-run", action="store_true", help="the script itself on CPU; its times mean nothing")
    args = parser.parse_args()
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        args.dtypes = ["fp16"]  # the interpreter multiplies the bits of bf16
    args.device = "cpu" if args.dry_run else "cuda"
    args.libraries = {"cpu": on_cpu} if args.dry_run else LIBRARIES
    return args


def main() -> None:
    args = parse()
    from usp import kernels

    missing = kernels.reason_against(args.device)
    if missing is not None:
        sys.exit(f"nothing to measure: {missing}")
    budget = Budget(args.budget)
    about = {**environment(), **device_facts(args)}
    print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    peaks = {dtype: measure_peak(dtype, args) for dtype in args.dtypes}
    print(f"matrix product, TFLOP/s: {peaks}")
    lengths = (32,) if args.dry_run else RING_LENGTHS
    steps = [measure_ring_step(n, args) for n in lengths if budget.allows(f"ring step {n}")]
    rings = [measure_ring(n, args) for n in (2, 4, 8)[: 1 if args.dry_run else 3]]
    for step in steps:
        print(f"ring step {step['length']}: {rounded(step['ratios'])}")
    for ring in rings:
        print(f"ring of {ring['ranks']}: efficiency {ring['efficiency']:.2f}", end="  ")
        print(rounded(ring["ratios"]))
    results = []
    for case in cases(args):
        if budget.allows(str(case)):
            for result in measure_local(case, args):
                print_local(result, peaks[case.dtype])
                results.append(result)
    if budget.left_out:
        print(f"left out for want of time: {len(budget.left_out)} cases")
    report = {
        "environment": about,
        "matrix_tflops": peaks,
        "local": results,
        "ring_steps": steps,
        "rings": rings,
        "left_out": budget.left_out,
    }
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        from _gpu_plots import draw

        for path in draw(report, args.json):
            print(f"drew {path}")


def rounded(ratios: dict[str, float]) -> str:
    return "  ".join(f"{name} / usp {ratio:.2f}" for name, ratio in ratios.items())


if __name__ == "__main__":
    main()
