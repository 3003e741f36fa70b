"""GPU kernels against torch's, FlexAttention and flash-attn; ring steps, rings, head exchanges.

make bench-gpu
usp bench gpu_attention --json result.json            (again: goes on with what was left out)
usp bench gpu_attention --json result.json --report   (prints and draws it; measures nothing)
usp bench gpu_attention --dry-run                     (no GPU: tiny sizes, times mean nothing)

Candidates run in turn in one process, in both orders; a ratio is the median over rounds of
time(rival) / time(usp), above 1 where usp is faster. TFLOP/s count 4 D of a visible pair forward
and 10 D backward, causal halves. Whoever is off by more than 3 times the best, against fp64, is
not timed; if that is usp, the program says so and ends with 1. The file is written after every
case. docs/benchmarks.md says what each family means.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from gpu import report as reports

from usp.bench.machine import environment
from usp.bench.records import Unreadable

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Report = dict[str, Any]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", type=Path, help="write every time taken there, and plots beside it")
    add("--report", action="store_true", help="print and draw what --json holds, measure nothing")
    add("--only", default="", metavar="TEXT", help="cases whose name holds it: 'ring', 'bf16 64'")
    add("--budget", type=float, default=440.0, help="seconds, after which no case is begun")
    add("--rounds", type=int, default=9, help="of each case, at most")
    add("--seconds", type=float, default=0.25, help="after which a case gets no further round")
    add("--commit", help="what to write down where there is no git")
    add("--dry-run", action="store_true", help="the script itself on CPU; its times mean nothing")
    args = parser.parse_args(argv)
    if args.report and args.json is None:
        parser.error("--report needs the --json file to report on")
    if args.dry_run and args.json is not None and RESULTS in args.json.resolve().parents:
        parser.error(f"a dry run measures nothing: {args.json} may not lie among the results")
    return args


def sources() -> str:
    """A digest of everything that a time depends on, so that a report is never of two versions."""
    digest = hashlib.sha256()
    for tree in ("usp", "csrc", "benchmarks"):
        for path in sorted((ROOT / tree).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def machine(args: argparse.Namespace, device: str) -> Report:
    """Where and with what."""
    import triton

    from usp import kernels

    about: Report = {**environment(), "triton": triton.__version__, "dry_run": args.dry_run}
    about["architecture"] = kernels.architecture(torch.device(device))
    about["commit"] = about["commit"] or args.commit or "unknown: no git here"
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
        about["cuda"], about["hip"] = torch.version.cuda, torch.version.hip
        about["cudnn"] = torch.backends.cudnn.version()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            about["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        except OSError:
            about["driver"] = "unknown: no nvidia-smi"
    return about


def begun(args: argparse.Namespace) -> Report:
    """The report to go on with: that of the file if it is of these sources and this GPU."""
    gpu = "none" if args.dry_run else torch.cuda.get_device_name()
    new: Report = reports.new(sources=sources(), gpu=gpu)
    if args.json is not None and args.json.is_file():
        try:
            old = reports.load(args.json)
        except (Unreadable, KeyError):
            old = {}
        if all(old.get(name) == new[name] for name in ("sources", "gpu")):
            print(f"going on with {args.json}: {len(old['done'])} cases are there")
            return old
        print(f"{args.json} is of other sources or another GPU: it will be replaced")
    return new


def start(args: argparse.Namespace, report: Report, settings: Any) -> None:
    """A new run of a report: the machine, its matrix product and its copy."""
    from gpu.case import own
    from gpu.measure import copy_bandwidth, matrix_tflops

    if settings.on_gpu:
        # recording a graph needs one stream for all that led there
        torch.cuda.set_stream(torch.cuda.Stream())
    about = machine(args, settings.device)
    about["matrix_tflops"] = {
        name: matrix_tflops(dtype, settings)
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
    }
    about["copy_bytes_per_second"] = copy_bandwidth(settings)
    print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    report["runs"].append(about)
    report["auto"] = next(iter(own("fp16", 128, settings.device)))


def measure(args: argparse.Namespace, report: Report, settings: Any, began: float) -> None:
    from gpu.families import items
    from gpu.guard import is_dead, said

    report["left_out"] = []
    for item in items(settings):
        seen = item.key in report["done"] or item.key in report["failed"]
        if seen or args.only not in item.key:
            continue
        if time.monotonic() - began > args.budget:
            report["left_out"].append(item.key)
            continue
        try:
            records = item.measure()
        except Exception as error:  # the others are still worth their time
            report["failed"][item.key] = said(error)
            print(f"{item.key}: {said(error)}", flush=True)
            reports.write(report, args.json)
            if is_dead():
                start_again(args, began)
            continue
        for record in records:
            record |= {"key": item.key, "run": len(report["runs"]) - 1}
            report["records"][item.family].append(record)
            print(line(record), flush=True)
        report["done"].append(item.key)
        reports.write(report, args.json)
        if settings.on_gpu:
            torch.cuda.empty_cache()
    reports.write(report, args.json)


def start_again(args: argparse.Namespace, began: float) -> NoReturn:
    """A fresh process for the time that is left; it finds in the file what is done."""
    if args.json is None:
        os._exit(1)
    left = max(args.budget - (time.monotonic() - began), 0.0)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.argv, f"--budget={left:.0f}"])


def make_guard(args: argparse.Namespace, report: Report, began: float) -> Any:
    """Where a candidate is fatal, a fresh process goes on without it."""
    from gpu.guard import Guard

    def fatal(name: str, reason: str) -> NoReturn:
        print(f"{name} took the GPU down: {reason}", flush=True)
        report["avoid"][name] = f"it took the GPU down before: {reason}"
        reports.write(report, args.json)
        start_again(args, began)

    return Guard(report["avoid"], fatal)


def line(record: Report) -> str:
    """What was measured, in one line; and who was not."""
    values, unit = record["seconds"], "us"
    shown = {name: f"{1e6 * seconds:.0f}" for name, seconds in values.items()}
    if "tflops" in record:
        shown, unit = {name: f"{rate:.0f}" for name, rate in record["tflops"].items()}, "TFLOP/s"
    head = f"{record['key']} {record.get('pass', '')} ({record['clock']}), {unit}: "
    text = head + "  ".join(f"{name} {value}" for name, value in shown.items())
    for name, reason in record["not_timed"].items():
        text += f"\n  {name} is not timed: {reason}"
    return text


def main() -> int:
    began = time.monotonic()
    args = parse()
    from gpu.goals import table, text
    from gpu.plots import draw

    if args.report:
        report = reports.load(args.json)
    else:
        if args.dry_run:
            os.environ["TRITON_INTERPRET"] = "1"
        report = measured(args, began)
    report["goals"] = table(report)
    print(text(report))
    if args.json is not None:
        reports.write(report, args.json)
        for path in draw(report, args.json):
            print(f"drew {path}")
    if report["left_out"]:
        print(f"no time was left for {len(report['left_out'])} cases: run it again to go on")
        print("\n".join(f"  {key}" for key in report["left_out"]))
    return said_of_wrong(report)


def measured(args: argparse.Namespace, began: float) -> Report:
    """The report, with what this run adds to it."""
    from gpu.measure import Settings

    from usp import kernels

    device = "cpu" if args.dry_run else "cuda"
    missing = kernels.reason_against(device)
    if missing is not None:
        sys.exit(f"nothing to measure: {missing}")
    report = begun(args)
    guard = make_guard(args, report, began)
    rounds, at_least = (1, 0.0) if args.dry_run else (args.rounds, 5e-3)
    settings = Settings(device, rounds, args.seconds, at_least=at_least, guard=guard)
    start(args, report, settings)
    measure(args, report, settings, began)
    return report


def said_of_wrong(report: Report) -> int:
    """1 if one of usp's kernels was wrong, or something could not be measured."""
    wrong = [
        f"{record['key']}: {name}: {reason}"
        for records in report["records"].values()
        for record in records
        for name, reason in record["wrong"].items()
        if name.startswith("usp ")
    ]
    wrong += [f"{name}: {why}" for name, why in report["avoid"].items() if name.startswith("usp ")]
    wrong += [f"{key} could not be measured: {why}" for key, why in report["failed"].items()]
    print("\n".join(f"WRONG: {text}" for text in dict.fromkeys(wrong)), end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
