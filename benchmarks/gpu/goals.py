"""What the GPU benchmark is to reach, and what a report says of it. Needs the report alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gpu.report import as_report
from usp.bench.preference import is_measured, measured_on, order
from usp.bench.timing import Times

Report = dict[str, Any]
Measured = Iterator[tuple[str, str, float]]  # who, where, value
LONG = (8192, 16384, 32768)
# One ring step over (flash + Python merge, the best library + fused merge), by local tokens.
STEP_GOALS = {1024: (1.4, 1.3), 2048: (1.25, 1.15), 4096: (1.15, 1.05), 8192: (1.1, 1.0)}


OWN = ("usp triton", "usp native", "usp hopper")


@dataclass(frozen=True)
class Goal:
    """A bound, and where a report holds what it bounds."""

    text: str
    bound: float
    measured: Callable[[Report], Measured]
    at_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def usps(record: dict[str, Any]) -> list[str]:
    """usp's own kernels: the goals are theirs, and not those of libraries behind its adapters."""
    return [name for name in record["seconds"] if name in OWN]


def ratio(record: dict[str, Any], over: str, under: str) -> float:
    return Times(record["rounds"]).ratio(over, under)


def against(rival: str, which: str, who: str, masks: tuple[str, ...] = ("causal", "full")) -> Any:
    """time(rival) / time(usp), head dim 128, bf16, 8k to 32k; ``who`` "best" is usp's fastest."""

    def measured(report: Report) -> Measured:
        for record in report["records"]["local"]:
            shape = (record["dtype"], record["head_dim"], record["pass"])
            if shape != ("bf16", 128, which) or record["length"] not in LONG:
                continue
            if record["mask"] not in masks or rival not in record["seconds"]:
                continue
            ours = [name for name in usps(record) if who in ("best", name)]
            if ours:
                name = min(ours, key=record["seconds"].__getitem__)
                yield who, f"{record['mask']} {record['length']}", ratio(record, rival, name)

    return measured


def steps(length: int, rivals: Callable[[dict[str, Any]], list[str]]) -> Any:
    """time(the fastest of some rivals) / time(usp) of one ring step."""

    def measured(report: Report) -> Measured:
        for record in report["records"]["ring_steps"]:
            found = [r for r in rivals(record) if r in record["seconds"]]
            if record["length"] == length and found:
                fastest = min(found, key=record["seconds"].__getitem__)
                for name in usps(record):
                    yield name, f"{fastest}, {record['clock']}", ratio(record, fastest, name)

    return measured


def with_fused_merge(record: dict[str, Any]) -> list[str]:
    return [name for name in record["seconds"] if name.endswith("+ fused merge")]


def state_cost(report: Report) -> Measured:
    for record in report["records"]["ring_steps"]:
        for name in usps(record):
            if record["length"] == 4096:
                yield name, "4096", ratio(record, name, f"{name}, no state")


def rings(field: str) -> Any:
    def measured(report: Report) -> Measured:
        for record in report["records"]["rings"]:
            for name, value in record[field].items():
                yield name, f"{record['ranks']} ranks, {record['pass']}", value

    return measured


def memory_growth(report: Report) -> Measured:
    """Most over least peak of a rank, over the sizes of the ring."""
    peaks: dict[tuple[str, str], list[int]] = {}
    for record in report["records"]["rings"]:
        for name in usps(record):
            peaks.setdefault((name, record["pass"]), []).append(record["peak_bytes"][name])
    for (name, which), found in peaks.items():
        if len(found) > 1 and min(found) > 0:
            yield name, which, max(found) / min(found)


def errors(report: Report) -> Measured:
    """usp's error over cuDNN's, each against fp64."""
    for record in report["records"]["local"]:
        theirs = record["errors"].get("sdpa cudnn")
        for name in usps(record):
            for part, error in record["errors"][name].items():
                if theirs and theirs[part] > 0:
                    yield name, f"{part}, {record['key']}", error / theirs[part]


def exchange(report: Report) -> Measured:
    for record in report["records"]["exchange"]:
        for name, share in record["of_copy"].items():
            if name.startswith("usp "):
                yield name, f"{record['pass']}, {record['degree']} ranks", share


MASKED = ("causal", "window", "documents")
GOALS = (
    Goal("forward over flash", 1.05, against("sdpa flash", "forward", "usp triton")),
    Goal("backward over flash", 0.9, against("sdpa flash", "backward", "usp triton")),
    Goal("backward over flex", 1.2, against("flex", "backward", "usp triton")),
    Goal("forward over flash", 0.9, against("sdpa flash", "forward", "usp native")),
    Goal("backward over flash", 0.85, against("sdpa flash", "backward", "usp native")),
    Goal("forward over cudnn", 0.95, against("sdpa cudnn", "forward", "usp native")),
    Goal("backward over cudnn", 0.9, against("sdpa cudnn", "backward", "usp native")),
    Goal("forward over cudnn", 0.9, against("sdpa cudnn", "forward", "usp hopper")),
    Goal("backward over cudnn", 0.85, against("sdpa cudnn", "backward", "usp hopper")),
    Goal("masks, forward over flex", 1.0, against("flex", "forward", "best", MASKED)),
    Goal("masks, backward over flex", 1.0, against("flex", "backward", "best", MASKED)),
    *(
        Goal(f"ring step of {n} over flash + Python merge", bounds[0], steps(n, python_merge))
        for python_merge in [lambda record: ["flash + Python merge"]]
        for n, bounds in STEP_GOALS.items()
    ),
    *(
        Goal(
            f"ring step of {n} over a library + fused merge", bounds[1], steps(n, with_fused_merge)
        )
        for n, bounds in STEP_GOALS.items()
    ),
    Goal("state over no state, 4k", 1.05, state_cost, at_most=True),
    Goal("efficiency of the zigzag ring", 0.92, rings("efficiency")),
    Goal("ring's peak memory over flash + Python merge's", 0.4, rings("memory"), at_most=True),
    Goal("ring's peak memory, most over least ranks", 1.05, memory_growth, at_most=True),
    Goal("error over cudnn's", 1.25, errors, at_most=True),
    Goal("head exchange over copy bandwidth", 0.85, exchange),
)


def table(report: Report) -> list[dict[str, Any]]:
    """A row for each goal and each of usp's kernels: the worst figure, and whether it is enough."""
    rows = []
    for goal in GOALS:
        worst: dict[str, tuple[float, str, int]] = {}
        for who, where, value in goal.measured(report):
            held = worst.get(who)
            count = 1 if held is None else held[2] + 1
            is_worse = held is None or (value > held[0] if goal.at_most else value < held[0])
            worst[who] = (value, where, count) if held is None or is_worse else (*held[:2], count)
        sign = "<=" if goal.at_most else ">="
        about = {"goal": goal.text, "bound": f"{sign} {goal.bound:g}"}
        if not worst:
            rows.append({**about, "who": "", "verdict": "not measured"})
        for who, (value, where, count) in worst.items():
            verdict = "met" if goal.met(value) else "missed"
            found = {"worst": value, "where": where, "cases": count, "verdict": verdict}
            rows.append({**about, "who": who, **found})
    return rows


def preferred(report: Report) -> list[dict[str, Any]]:
    """For each dtype and head dim, usp's kernels by their mean time; what "auto" takes now."""
    times: dict[tuple[str, int], dict[str, list[float]]] = {}
    for record in report["records"]["local"]:
        names = usps(record)
        if len(names) < 2 or names != record["usp"]:
            continue
        shared = times.setdefault((record["dtype"], record["head_dim"]), {})
        for name in names:
            shared.setdefault(name, []).append(math.log(record["seconds"][name]))
    found = []
    for (dtype, head_dim), logs in times.items():
        means = {name: math.exp(sum(x) / len(x)) for name, x in logs.items() if len(x) > 0}
        fastest = min(means, key=means.__getitem__)
        over = {name: mean / means[fastest] for name, mean in means.items()}
        found.append({"dtype": dtype, "head_dim": head_dim, "fastest": fastest, "over": over})
    return found


def text(report: Report) -> str:
    """Both tables, to be read."""
    lines = ["", "Goals (the worst of all cases counts):"]
    for row in table(report):
        value = f"{row['worst']:.3g}" if "worst" in row else "-"
        where = f"  {row['where']} (of {row['cases']})" if "where" in row else ""
        lines.append(
            f"  {row['verdict']:13}{value:>7} {row['bound']:8}{row['who']:12} {row['goal']}{where}"
        )
    lines += ["", f'"auto" takes {report["auto"]} on this device. Mean time over the fastest:']
    for row in preferred(report):
        over = "  ".join(f"{name} {value:.2f}" for name, value in row["over"].items())
        lines.append(f"  {row['dtype']} {row['head_dim']:4}  {over}")
    if not preferred(report):
        lines.append("  only one of usp's kernels was measured: nothing to prefer")
    elif is_measured(as_report(report)):
        found = as_report(report)
        row = f'"{measured_on(found)}": Preference({order([found])}, ("<this file>",))'
        lines.append(f"Over all cases, as usp/backends/preference.py has it:\n  {row}")
    return "\n".join(lines)
