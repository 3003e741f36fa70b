"""The README's tables of speed, made from committed results and from nothing else.

python scripts/readme_figures.py            writes them between their marks
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from usp.bench.grouping import Row, grouped
from usp.bench.records import Report, read
from usp.bench.table import rows_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: scripts/readme_figures.py -->", "<!-- /figures -->"
GENERATIONS = {
    "AMD EPYC / 25 / 1": "Zen 3",
    "AMD EPYC / 25 / 17": "Zen 4",
    "AMD EPYC / 26 / 2": "Zen 5",
}


@dataclass(frozen=True)
class Line:
    """A line of a table: time(``over``) / time(``under``) in some cases of some files.

    Attributes:
        title: Of the cases.
        files: A pattern each; of those that fit, the last by name, so the newest, counts.
        cases: What a case must hold to be among them.
    """

    title: str
    files: tuple[str, ...]
    over: str
    under: str
    cases: Mapping[str, Any] = field(default_factory=dict)


def kernels(title: str, *files: str, **cases: Any) -> Line:
    return Line(title, files, "sdpa", "usp native", cases)


ZEN4 = tuple(
    f"2026-11-21b-cpu_attention-{dtype}-512-2048-epyc-2-cores.json" for dtype in ("fp32", "bf16")
)
ONE_DEVICE = (
    kernels("shapes of ViTs, 197 to 4097 tokens", "*-kernels-vit-epyc-family-26-*"),
    kernels("2048 tokens, full", *ZEN4, length=2048, mask="full"),
    kernels("2048 tokens, causal", *ZEN4, length=2048, mask="causal"),
)
RINGS = tuple(
    Line(f"{peer}, {mask}", ("*-ring-fp32-epyc-family-26-*",), peer, mesh, {"mask": mask})
    for peer, mesh in (("plain torch ring", "usp 1 x 4"), ("DeepSpeed-Ulysses", "usp 4 x 1"))
    for mask in ("full", "causal")
)


def newest(pattern: str) -> Path:
    found = sorted(RESULTS.glob(pattern))
    if not found:
        raise SystemExit(f"no result of {RESULTS} fits {pattern}")
    return found[-1]


def machine(report: Report) -> str:
    about = report.header
    return f"{about['cores']} cores of a {GENERATIONS[about['cpu']]}"


def ratios(line: Line, what: str, dtype: str) -> list[float]:
    """Of each case, the median over rounds of the ratio within a round."""
    rows: Iterable[Row] = (
        row
        for file in line.files
        for group in grouped(read(newest(file)).records)
        if group.what == what
        for row in group.rows
    )
    wanted = {"dtype": dtype, **line.cases}
    some = (row for row in rows if all(row.case.get(k) == v for k, v in wanted.items()))
    return [ratio for row in some if (ratio := row.ratio(line.over, line.under)) is not None]


def cell(found: list[float]) -> str:
    """Their geometric mean, and from where to where they go."""
    if not found:
        return "-"
    mean = f"{math.exp(sum(map(math.log, found)) / len(found)):.2f}"
    return mean if len(found) == 1 else f"{mean} ({min(found):.2f} to {max(found):.2f})"


def table(lines: Iterable[Line], dtypes: tuple[str, ...]) -> str:
    head = ["machine", "", *(f"{d}, {way}" for d in dtypes for way in ("forward", "with backward"))]
    rows = [head]
    for line in lines:
        where = machine(read(newest(line.files[0])))
        cells = (cell(ratios(line, what, d)) for d in dtypes for what in ("forward", "both"))
        rows.append([where, line.title, *cells])
    return rows_of(rows)


def text() -> str:
    return "\n\n".join(
        (
            "time(SDPA) / time(usp) on one device, geometric means and ranges:",
            table(ONE_DEVICE, ("fp32", "bf16")),
            "time(peer) / time(usp), four processes, 4096 tokens of 8 heads of 64:",
            table(RINGS, ("fp32",)),
        )
    )


def up_to_date(page: str) -> str:
    """The page, with what stands between its marks made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{text()}\n\n{END}{after}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(up_to_date(readme.read_text()))
