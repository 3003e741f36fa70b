"""A picture of a file of results.

usp bench plot kernels.json --out kernels.png
usp bench plot ring.json --what both --out ring.svg

A panel for each thing that was computed and each set of sizes; a line a candidate over what has
most values (tokens, bytes, processes), with its 20th to 80th percentile; where nothing varies, a
bar each. Rates where flops or bytes are known, else times. Needs matplotlib (usp[bench]).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from usp.bench.grouping import ROOFS, Group, Row
from usp.bench.options import BenchError
from usp.bench.records import Record
from usp.bench.show import sizes
from usp.bench.shown_file import groups_of, in_words, load, shown_parser

OVER = (
    "length",
    "tokens",
    "bytes",
    "processes",
    "ranks",
)  # the horizontal axis, the first that varies
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#000000")
MOST_PANELS, COLUMNS = 24, 3


@dataclass
class Panel:
    """Some cases of one ``what`` that differ in ``over`` alone."""

    title: str
    over: str | None
    rows: list[Row]
    names: list[str]


def main(argv: Sequence[str]) -> int:
    made = shown_parser("plot", __doc__)
    made.add_argument("--out", type=Path, metavar="FILE.png", help="by default beside FILE")
    args = made.parse_args(list(argv))
    report = load(args.file)
    panels = [panel for group in groups_of(report, args.what) for panel in panels_of(group)]
    if not panels:
        raise BenchError(f"{args.file} holds no times{' of these' if args.what else ''}")
    out = args.out or args.file.with_suffix(".png")
    try:
        draw(panels[:MOST_PANELS], ", ".join(in_words(report)), out)
    except ValueError as error:  # of matplotlib: a format that it does not know
        raise BenchError(f"--out {out}: {error}") from error
    print(out)
    if len(panels) > MOST_PANELS:
        print(f"{len(panels) - MOST_PANELS} panels had no place: name some with --what")
    return 0


def panels_of(group: Group) -> Iterator[Panel]:
    """Cases that differ in one number together, others alone."""
    if not group.names:
        return
    over = next((field for field in OVER if field in group.differ), None)
    sets: dict[str, list[Row]] = {}
    for row in group.rows:
        rest = {k: v for k, v in row.case.items() if k != over}
        sets.setdefault(sizes(rest), []).append(row)
    for title, rows in sets.items():
        names = [name for name in group.names if any(name in row.by_name for row in rows)]
        yield Panel(f"{group.what}: {title}", over if len(rows) > 1 else None, rows, names)


def measure_of(record: Record) -> tuple[str, float]:
    """Label and factor: what is drawn is factor / seconds, or seconds."""
    for name, label, unit in (("flops_per_s", "GFLOP/s", 1e9), ("bytes_per_s", "GB/s", 1e9)):
        if name in record:
            return label, record[name] * record["median"] / unit
    return "seconds", 0.0


def point(record: Record) -> tuple[float, float, float]:
    """Middle, lower, upper."""
    _, work = measure_of(record)
    middle, low, high = record["median"], record["p20"], record["p80"]
    if not work:
        return middle, low, high
    return work / middle, work / high, work / low


def draw(panels: list[Panel], title: str, out: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError(f"plot needs matplotlib: pip install 'usp[bench]' ({error})") from error
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 0.6 + 3.4 * rows), layout="constrained")
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    names = list(dict.fromkeys(name for panel in panels for name in panel.names))
    others = [name for name in names if name not in ROOFS]
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}
    for axes, panel in zip(grid, panels, strict=False):
        one(axes, panel, colour)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(out, dpi=120)


def one(axes: Any, panel: Panel, colour: dict[str, str]) -> None:
    """A panel."""
    axes.set_title(panel.title, fontsize=8, loc="left", wrap=True)
    first = next(r for row in panel.rows for r in row.by_name.values() if r["record"] == "time")
    axes.set_ylabel(measure_of(first)[0])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    timed = {
        name: [
            (row.case.get(panel.over or "", 0), *point(row.by_name[name]))
            for row in panel.rows
            if row.by_name.get(name, {}).get("record") == "time"
        ]
        for name in panel.names
    }
    timed = {name: sorted(points) for name, points in timed.items() if points}
    if panel.over is None:
        bars(axes, timed, colour)
        return
    for name, points in timed.items():
        x, middle, low, high = zip(*points, strict=True)
        style = {"color": colour.get(name, "0.5"), "linestyle": "-" if name in colour else ":"}
        axes.plot(x, middle, "o", markersize=3, label=name, **style)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(panel.over)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=7)


def bars(axes: Any, timed: dict[str, list[Any]], colour: dict[str, str]) -> None:
    """One case: a bar each, lying."""
    names = list(timed)[::-1]
    for place, name in enumerate(names):
        _, middle, low, high = timed[name][0]
        axes.barh(place, middle, color=colour.get(name, "0.8"), height=0.6)
        axes.plot([low, high], [place, place], color="0.2", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel(axes.get_ylabel())
    axes.set_ylabel("")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="0.9")
