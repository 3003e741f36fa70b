"""One plot for each family of results, drawn from the JSON alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def draw(report: dict[str, Any], beside: Path) -> Iterator[Path]:
    """Write the plots next to ``beside``; yields their paths, none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    families: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in report["local"]:
        key = tuple(result[name] for name in ("dtype", "head_dim", "mask", "pass"))
        families.setdefault(key, []).append(result)
    for key, results in families.items():
        figure, axes = pyplot.subplots(figsize=(6, 4))
        for name in dict.fromkeys(n for result in results for n in result["tflops"]):
            points = sorted(
                (r["length"], r["tflops"][name]) for r in results if name in r["tflops"]
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.axhline(report["matrix_tflops"][key[0]], color="grey", ls=":", label="matrix product")
        title = f"{key[3]}, {key[2]}, head dim {key[1]}, {key[0]}"
        axes.set(xscale="log", xlabel="tokens of a sequence", ylabel="TFLOP/s", title=title)
        axes.legend()
        yield _save(figure, beside, "-".join(map(str, key)))
    for name, kind, x in (("ring-step", "ring_steps", "length"), ("ring", "rings", "ranks")):
        if report[kind]:
            figure, axes = pyplot.subplots(figsize=(6, 4))
            for rival in report[kind][0]["ratios"]:
                points = [(r[x], r["ratios"][rival]) for r in report[kind]]
                axes.plot(*zip(*points, strict=True), marker="o", label=rival)
            axes.axhline(1.0, color="grey", ls=":")
            axes.set(xlabel=x, ylabel="time / time of usp", title=name)
            axes.legend()
            yield _save(figure, beside, name)


def _save(figure: Any, beside: Path, name: str) -> Path:
    path = beside.with_name(f"{beside.stem}-{name}.png")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path
