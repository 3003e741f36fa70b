"""Which of usp's backends the results of a benchmark prefer. Needs the files alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator

from usp.backends import TABLE
from usp.bench.grouping import grouped
from usp.bench.records import Report
from usp.machine.cpu import vendor_of

WHAT = ("forward", "backward", "both")
# usp's Hopper kernels are Triton's, another way.
BACKENDS = {f"usp {backend.NAME}": backend.NAME for backend in TABLE}
# On a CPU torch's bare call is the least that the sdpa backend takes.
BARE = {"sdpa": "sdpa"}


def measured_on(report: Report) -> str:
    """The device that a report is of, as ``usp.backends.preference.measured_on`` names it."""
    about = report.header
    if about.get("architecture"):
        return str(about["architecture"])
    vendor = about.get("cpu_vendor") or vendor_of(about["cpu"])
    return f"cpu {vendor} {about['cpu_capability']}"


def is_measured(report: Report) -> bool:
    """Whether its times are a device's, and not those of a rehearsal."""
    return not report.header.get("dry_run")


def medians(report: Report) -> Iterator[dict[str, float]]:
    """Seconds of each backend in each case of attention on one device."""
    for group in grouped(report.records):
        for row in group.rows if group.what in WHAT else ():
            timed = {n: r["median"] for n, r in row.by_name.items() if r["record"] == "time"}
            names = BACKENDS if "usp sdpa" in timed else {**BACKENDS, **BARE}
            yield {names[name]: median for name, median in timed.items() if name in names}
    for record in report.of("local"):  # of gpu_attention
        yield {
            BACKENDS[name]: statistics.median(seconds)
            for name, seconds in record["rounds"].items()
            if name in BACKENDS
        }


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
