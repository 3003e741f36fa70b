"""Live progress and rows of figures: by rich where it is installed, else in plain lines."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from usp.bench.records import Record


class Show:
    """What a run says while it goes on. Everything goes to one stream.

    Args:
        stream: Where to; the standard error where the standard output is for records.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._progress: Any = None
        self._task: Any = None

    def say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    @contextmanager
    def progress(self, total: int) -> Iterator[None]:
        """Around what has so many cases; a bar where there is a terminal and rich."""
        if not (self._stream.isatty() and importlib.util.find_spec("rich")):
            yield
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns, TimeElapsedColumn(), console=Console(file=self._stream), transient=True
        ) as self._progress:
            self._task = self._progress.add_task("", total=total)
            yield
        self._progress = None

    def begin(self, name: str) -> None:
        """A case begins."""
        if self._progress is not None:
            self._progress.update(self._task, description=name[:44])

    def done(self) -> None:
        """A case is over."""
        if self._progress is not None:
            self._progress.advance(self._task)

    def case(self, records: list[Record]) -> None:
        """What was measured of one case: a line for each candidate."""
        if not records:
            return
        self.say(f"{records[0]['what']}: {sizes(records[0]['case'])}")
        for record in records:
            self.say(f"  {row(record)}")


def sizes(case: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value}" if isinstance(value, (int, float)) else str(value)
        for name, value in case.items()
    )


def row(record: Record) -> str:
    """A candidate: median, 20th and 80th percentile, and what else is known of it."""
    name = f"{record['candidate']:22}"
    if record["record"] == "not_timed":
        return f"{name} {'WRONG' if record['wrong'] else 'not timed'}: {record['why']}"
    if record["record"] == "value":
        return f"{name} " + "  ".join(f"{k} {number(v)}" for k, v in record["values"].items())
    text = f"{name} {duration(record['median']):>10}  [{duration(record['p20'])} .. "
    text += f"{duration(record['p80'])}]"
    if "flops_per_s" in record:
        text += f"  {record['flops_per_s'] / 1e9:8.1f} GFLOP/s"
    if "bytes_per_s" in record:
        text += f"  {record['bytes_per_s'] / 1e9:8.2f} GB/s"
    if "of_roof" in record:
        text += f"  {100 * record['of_roof']:5.1f} % of {record['roof']}"
    if "efficiency" in record:
        text += f"  efficiency {record['efficiency']:.2f}"
    if "errors" in record:
        worst = max(record["errors"], key=lambda tensor: record["errors"][tensor])
        text += f"  {worst} off by {record['errors'][worst]:.1e}"
    return text


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def stream_of(json: str | None) -> Any:
    """Where lines go: not where the records do."""
    return sys.stderr if json == "-" else sys.stdout
