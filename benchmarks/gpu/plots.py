"""Plots of each family of results, drawn from the JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def draw(report: dict[str, Any], beside: Path) -> Iterator[Path]:
    """Write the plots next to ``beside``; yields their paths, none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    records = report["records"]
    for key, found in grouped(records["local"], "mask", "dtype", "head_dim", "pass"):
        title = f"{key[3]}, {key[0]}, {key[1]}, head dim {key[2]}"
        peak = report["runs"][found[0]["run"]]["matrix_tflops"][key[1]]
        axes = new_axes("tokens of a sequence", "TFLOP/s", title)
        lines(axes, found, "length", lambda record: record["tflops"])
        axes.axhline(peak, color="grey", ls=":", label="matrix product")
        yield save(axes, beside, "-".join(map(str, ("local", *key))))
    if records["ring_steps"]:
        axes = new_axes("local tokens", "microseconds", "one ring step into a state")
        lines(axes, records["ring_steps"], "length", microseconds)
        axes.set_yscale("log")
        yield save(axes, beside, "ring-step")
    for (which,), found in grouped(records["rings"], "pass"):
        axes = new_axes("ranks", "one call for the whole / ring", f"efficiency, {which}")
        lines(axes, found, "ranks", lambda record: record["efficiency"])
        yield save(axes, beside, f"ring-efficiency-{which}")
        axes = new_axes("ranks", "MiB", f"peak memory of a rank beyond its inputs, {which}")
        lines(axes, found, "ranks", mebibytes)
        yield save(axes, beside, f"ring-memory-{which}")
    for (which,), found in grouped(records["exchange"], "pass"):
        axes = new_axes("ranks", "of copy bandwidth", f"head exchange, {which}")
        lines(axes, found, "degree", lambda record: record["of_copy"])
        yield save(axes, beside, f"exchange-{which}")


def microseconds(record: Record) -> dict[str, float]:
    return {name: 1e6 * seconds for name, seconds in record["seconds"].items()}


def mebibytes(record: Record) -> dict[str, float]:
    return {name: size / 2**20 for name, size in record["peak_bytes"].items()}


def grouped(records: list[Record], *names: str) -> Iterator[tuple[tuple[Any, ...], list[Record]]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    yield from groups.items()


def new_axes(x: str, y: str, title: str) -> Any:
    from matplotlib import pyplot

    axes = pyplot.subplots(figsize=(6, 4))[1]
    axes.set(xlabel=x, ylabel=y, title=title, xscale="log")
    return axes


def lines(
    axes: Any, records: list[Record], x: str, values: Callable[[Record], dict[str, float]]
) -> None:
    """One line for each candidate."""
    for name in dict.fromkeys(n for record in records for n in values(record)):
        points = sorted((r[x], values(r)[name]) for r in records if name in values(r))
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    ticks = sorted({record[x] for record in records})
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks], minor=False)
    axes.minorticks_off()


def save(axes: Any, beside: Path, name: str) -> Path:
    from matplotlib import pyplot

    path = beside.with_name(f"{beside.stem}-{name}.png")
    axes.legend(fontsize="small")
    axes.figure.tight_layout()
    axes.figure.savefig(path, dpi=120)
    pyplot.close(axes.figure)
    return path
