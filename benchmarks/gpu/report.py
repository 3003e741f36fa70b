"""A report of the GPU benchmark as a file: one record a line, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from usp.bench import records
from usp.bench.records import Report

FAMILIES = ("local", "ring_steps", "rings", "exchange")


def new(**more: Any) -> dict[str, Any]:
    """What a first run begins with."""
    lists: dict[str, Any] = {"runs": [], "done": [], "left_out": [], "failed": {}, "avoid": {}}
    return {**more, **lists, "records": {family: [] for family in FAMILIES}}


def as_report(report: dict[str, Any]) -> Report:
    """The header tells the machine of the last run, and all that is no figure."""
    rest = {name: value for name, value in report.items() if name != "records"}
    last = report["runs"][-1] if report["runs"] else {}
    rehearsed = any(run.get("dry_run") for run in report["runs"])
    head = {"record": "header", "program": "gpu_attention", **last, "dry_run": rehearsed}
    figures = [
        {"record": family, **record}
        for family, found in report["records"].items()
        for record in found
    ]
    return Report({**head, "report": rest}, figures)


def write(report: dict[str, Any], file: Path | None) -> None:
    """A run that is cut off loses nothing."""
    if file is None:
        return
    found = as_report(report)
    scratch = file.with_name(f"{file.name}.part")
    lines = [records.line(record) for record in (found.header, *found.records)]
    scratch.write_text("\n".join(lines) + "\n")
    scratch.replace(file)


def load(file: Path) -> dict[str, Any]:
    """As it was written."""
    found = records.read(file)
    report: dict[str, Any] = found.header["report"]
    report["records"] = {family: [] for family in FAMILIES}
    for record in found.records:
        family = record.pop("record")
        report["records"][family].append(record)
    return report
