"""Which of usp's backends the results of a benchmark prefer. Needs the files alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from _measure import Times

from usp.backends.library import LIBRARIES
from usp.machine.cpu import vendor_of

Report = dict[str, Any]
# Candidates of the reports that are backends, or bound one: torch's bare call is the least that
# the sdpa backend takes.
CPU = {"usp": "native", "sdpa": "sdpa"}
GPU = {f"usp {name}": name for name in ("triton", "native", *(b.NAME for b in LIBRARIES))}


def measured_on(report: Report) -> str:
    """The device that a report is of, as ``usp.backends.preference.measured_on`` names it."""
    if "cases" not in report:
        return str(report["runs"][-1]["architecture"])
    about = report["environment"]
    vendor = about.get("cpu_vendor") or vendor_of(about["cpu"])
    return f"cpu {vendor} {about['cpu_capability']}"


def is_measured(report: Report) -> bool:
    """Whether its times are a device's, and not those of a rehearsal."""
    return "cases" in report or not any(run["dry_run"] for run in report["runs"])


def medians(report: Report) -> Iterator[dict[str, float]]:
    """Seconds of each backend in each case of attention on one device."""
    cases = report["cases"] if "cases" in report else report["records"]["local"]
    names = CPU if "cases" in report else GPU
    for case in cases:
        times = Times(case.get("rounds", case["seconds"]))
        yield {names[name]: times.median(name) for name in times.seconds if name in names}


def means(reports: Iterable[Report]) -> dict[str, float]:
    """Geometric mean time of each backend over the fastest's, in the cases that all of them did."""
    cases = [found for report in reports for found in medians(report)]
    names = sorted({name for found in cases for name in found})
    shared = [found for found in cases if len(found) == len(names)]
    if not shared:
        return {}
    logs = {name: sum(math.log(found[name]) for found in shared) for name in names}
    least = min(logs.values())
    return {name: math.exp((logs[name] - least) / len(shared)) for name in names}


def order(reports: Iterable[Report]) -> tuple[str, ...]:
    """The row's: the fastest first."""
    found = means(reports)
    return tuple(sorted(found, key=found.__getitem__))
