"""Two files of results against each other.

usp bench compare before.json after.json
usp bench compare before.json after.json --allow 1.1 --json

Of every measurement that is in both: time(B) / time(A) of the medians, and whether that is more
than noise: "faster" or "slower" where the 20th to 80th percentiles do not overlap. What the machine
itself does (a matrix product, a copy, in the same rounds) stands first: where it differs, so does
the machine. The exit code is 1 where a candidate of usp is slower by more than --allow.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from usp.bench import machine
from usp.bench.grouping import ROOFS, key_of
from usp.bench.options import BenchError, positive
from usp.bench.records import Record, Report, Sink
from usp.bench.show import duration, sizes, stream_of
from usp.bench.shown_file import load

SAME = ("program", "cpu", "cpu_capability", "gpu", "threads", "torch", "clock")


def main(argv: Sequence[str]) -> int:
    made = argparse.ArgumentParser(
        prog="usp bench compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("a", type=Path, metavar="A.json")
    add("b", type=Path, metavar="B.json")
    add("--allow", type=positive, default=1.05, help="time(B) / time(A) that is no loss (1.05)")
    add("--json", nargs="?", const="-", metavar="FILE", help="one record a line; no FILE: stdout")
    args = made.parse_args(list(argv))
    a, b = load(args.a), load(args.b)
    found = compared(a, b, args.allow)
    if not found:
        raise BenchError(f"{args.a} and {args.b} hold no measurement that is in both")
    out = stream_of(args.json)
    for name in SAME:
        if a.header.get(name) != b.header.get(name):
            print(f"note: {name}: {a.header.get(name)} and {b.header.get(name)}", file=out)
    for record in found:
        print(line(record), file=out)
    for text in summary(found, unmatched(a, b)):
        print(text, file=out)
    sink = Sink(args.json, machine.header("compare", "cpu", vars(args), "none"))
    for record in found:
        sink.add(record)
    sink.close()
    return int(any(record["loss"] for record in found))


def compared(a: Report, b: Report, allow: float) -> list[Record]:
    """A record of each measurement that is in both; those of the machine itself first."""
    before = {key_of(record): record for record in a.of("time")}
    found = []
    for record in b.of("time"):
        old = before.get(key_of(record))
        if old is None:
            continue
        ratio = record["median"] / old["median"]
        verdict = "same"
        if record["p80"] < old["p20"]:
            verdict = "faster"
        elif record["p20"] > old["p80"]:
            verdict = "slower"
        loss = verdict == "slower" and ratio > allow and record["candidate"].startswith("usp")
        told = {name: record[name] for name in ("what", "case", "candidate")}
        times = {"before": old["median"], "after": record["median"], "ratio": ratio}
        found.append({"record": "compared", **told, **times, "verdict": verdict, "loss": loss})
    return sorted(found, key=lambda record: record["candidate"] not in ROOFS)


def unmatched(a: Report, b: Report) -> tuple[int, int]:
    """Measurements of A alone, and of B alone."""
    keys = [{key_of(record) for record in report.of("time")} for report in (a, b)]
    return len(keys[0] - keys[1]), len(keys[1] - keys[0])


def line(record: Record) -> str:
    sign = {"same": " ", "faster": "+", "slower": "-"}[record["verdict"]]
    text = f"{sign} {record['ratio']:6.3f}  {duration(record['before']):>9} -> "
    text += f"{duration(record['after']):>9}  {record['candidate']}, {record['what']}: "
    return text + sizes(record["case"]) + ("  LOSS" if record["loss"] else "")


def summary(found: list[Record], alone: tuple[int, int]) -> list[str]:
    """By candidate: the geometric mean, and how many are more than noise."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in found:
        groups.setdefault(record["candidate"], []).append(record)
    texts = ["", "time(B) / time(A), geometric means"]
    for name, some in groups.items():
        mean = math.exp(statistics.fmean(math.log(record["ratio"]) for record in some))
        count = {v: sum(r["verdict"] == v for r in some) for v in ("faster", "same", "slower")}
        told = ", ".join(f"{number} {verdict}" for verdict, number in count.items())
        texts.append(f"  {name:24} {mean:6.3f}  ({told})")
    if any(alone):
        texts.append(f"in A alone {alone[0]}, in B alone {alone[1]}")
    return texts
