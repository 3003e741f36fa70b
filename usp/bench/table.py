"""A Markdown table of a file of results.

usp bench table kernels.json
usp bench table kernels.json --over sdpa --what forward      (time(sdpa) / time(each) beside)
usp bench table ring.json --out docs/ring.md

A row a case, a column a candidate: the median of its time, in brackets the 20th and 80th
percentile. With --over a candidate's name, the median over rounds of its time over each one's
stands there too: above 1 the other is faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from usp.bench.grouping import ROOFS, Group, Row
from usp.bench.options import BenchError
from usp.bench.records import Record, Report
from usp.bench.show import duration, number
from usp.bench.shown_file import groups_of, in_words, load, shown_parser


def main(argv: Sequence[str]) -> int:
    made = shown_parser("table", __doc__)
    add = made.add_argument
    add("--over", metavar="CANDIDATE", help="ratios to this one, too")
    add("--out", type=Path, metavar="FILE.md", help="there, and not to the standard output")
    args = made.parse_args(list(argv))
    report = load(args.file)
    _check(report, args.what, args.over)
    text = markdown(report, args.what, args.over)
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text + "\n")
    return 0


def _check(report: Report, what: Sequence[str] | None, over: str | None) -> None:
    """Raises:
    BenchError: the file has nothing of what was named.
    """
    there = {name for r in report.records for name in (r.get("what"), r["record"])}
    timed = {r["candidate"] for r in report.of("time")}
    for option, asked, known in (("--what", what, there), ("--over", over and [over], timed)):
        if asked and not set(asked) & known:
            raise BenchError(f"{option} {' '.join(asked)}: the results have none of these")


def markdown(report: Report, what: Sequence[str] | None = None, over: str | None = None) -> str:
    """All tables, each below a line that says what all its cases share."""
    program, where = in_words(report)
    parts = [f"`{program}`, {where}."]
    known = {"time", "not_timed", "value", "roofline", "end"}
    for group in groups_of(report, what):
        parts += times(group, over)
    parts += values([r for r in report.of("value") if what is None or r["what"] in what])
    others = dict.fromkeys(r["record"] for r in report.records if r["record"] not in known)
    for kind in others:
        if what is None or kind in what:
            parts += [f"**{kind}**", plain(report.of(kind))]
    return "\n\n".join(parts)


def times(group: Group, over: str | None) -> Iterator[str]:
    """A title, the table, and who is not in it."""
    yield f"**{group.what}**: {said(group.same)}" if group.same else f"**{group.what}**"
    names, fields = group.names, group.differ
    lines: list[list[str]] = [[*fields, *names]]
    for row in group.rows:
        sizes = [str(row.case.get(field, "")) for field in fields]
        lines.append([*sizes, *(cell(row, name, over) for name in names)])
    if not fields:
        lines = [line if i else ["", *line] for i, line in enumerate(lines)]
        lines[1:] = [["", *line] for line in lines[1:]]
    yield rows_of(lines)
    reasons: dict[str, dict[str, None]] = {}
    for row in group.rows:
        for name, record in row.by_name.items():
            if record["record"] == "not_timed":
                reasons.setdefault(name, {})[record["why"]] = None
    if reasons:
        yield "Not timed: " + "; ".join(f"{n} ({', '.join(why)})" for n, why in reasons.items())


def cell(row: Row, name: str, over: str | None) -> str:
    record = row.by_name.get(name)
    if record is None or record["record"] != "time":
        return "-"
    text = f"{duration(record['median'])} ({duration(record['p20'])} - {duration(record['p80'])})"
    ratio = row.ratio(over, name) if over is not None and name not in (over, *ROOFS) else None
    return text if ratio is None else f"{text}, {ratio:.2f}"


def values(records: list[Record]) -> Iterator[str]:
    """What was counted: a row a candidate, by ``what``."""
    for what in dict.fromkeys(record["what"] for record in records):
        some = [record for record in records if record["what"] == what]
        yield f"**{what}**"
        yield plain({**r["case"], "candidate": r["candidate"], **r["values"]} for r in some)


def plain(records: Iterable[Record]) -> str:
    """Every field that is text or a number, a column each."""
    rows = [
        {k: v for k, v in record.items() if k != "record" and isinstance(v, (str, int, float))}
        for record in records
    ]
    fields = list(dict.fromkeys(key for row in rows for key in row))
    return rows_of([fields, *([number(row.get(f, "-")) for f in fields] for row in rows)])


def rows_of(lines: list[list[str]]) -> str:
    head, *others = lines
    drawn = [head, ["---"] * len(head), *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in drawn)


def said(case: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in case.items())
