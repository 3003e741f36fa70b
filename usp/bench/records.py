"""What a run leaves behind: JSON, one record a line.

The first line is the ``header``: program, arguments, date, machine, versions, commit. Then come
``roofline`` (what the machine does at most), a ``time`` for each case and candidate, or a
``not_timed`` that says why there is none, ``value`` where something is counted and not timed, and
``end``. A file that is cut off holds what was measured until then.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from usp.bench.timing import Times

Record = dict[str, Any]
DIGITS = 5  # of a float: what a clock can tell


class Unreadable(ValueError):
    """A file that holds no results."""


class Sink:
    """Takes records as they come, and writes each at once.

    Args:
        file: Where to, "-" for the standard output, None for nowhere.
        header: The first record.
    """

    def __init__(self, file: str | Path | None, header: Record) -> None:
        self.records: list[Record] = []
        self._stream: TextIO | None = None
        if file is not None:
            self._stream = sys.stdout if str(file) == "-" else Path(file).open("w")  # noqa: SIM115
        self.add(header)

    def add(self, record: Record) -> None:
        self.records.append(record)
        if self._stream is not None:
            self._stream.write(line(record) + "\n")
            self._stream.flush()

    def close(self) -> None:
        if self._stream is not None and self._stream is not sys.stdout:
            self._stream.close()


@dataclass(frozen=True)
class Report:
    """A file of results.

    Attributes:
        header: The first record.
        records: All others, in order.
    """

    header: Record
    records: list[Record]

    def of(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["record"] == kind]


def read(file: str | Path) -> Report:
    """The records of a file.

    Raises:
        Unreadable: it is not there, or holds something else; says what.
    """
    try:
        text = Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{file} cannot be read: {error}") from error
    try:
        records = [json.loads(each) for each in text.splitlines() if each.strip()]
    except json.JSONDecodeError as error:
        raise Unreadable(f"{file} is not one JSON record a line: {error}") from error
    if not records or not all(isinstance(r, dict) and "record" in r for r in records):
        raise Unreadable(f"{file} holds no results of usp bench: no header is its first line")
    if records[0]["record"] != "header":
        raise Unreadable(f"{file} begins with a {records[0]['record']!r} and not with its header")
    return Report(records[0], records[1:])


def write_report(file: str | Path | None, header: Record, **results: Any) -> None:
    """Results of a program that has all of them at its end, each a line named by its keyword.

    Args:
        file: Nowhere if None.
        header: As ``machine.introduce`` gave it.
        results: A list of dicts, or a dict alone.
    """
    if file is None:
        return
    sink = Sink(file, header)
    for name, found in results.items():
        for each in found if isinstance(found, list) else [found]:
            sink.add({"record": name, **each})
    sink.close()


def line(record: Record) -> str:
    return json.dumps(_short(record), separators=(",", ":"), allow_nan=True)


def _short(item: Any) -> Any:
    if isinstance(item, float):
        return float(f"{item:.{DIGITS}g}")
    if isinstance(item, Mapping):
        return {key: _short(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_short(value) for value in item]
    return item


def time_records(
    what: str,
    case: Mapping[str, Any],
    times: Times,
    *,
    clock: str = "wall",
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[Record]:
    """A record for each candidate that was timed.

    Args:
        what: What was computed.
        case: Its sizes and options, numbers and text.
        clock: Which one.
        more: Of each candidate, what else is known of it: errors, flops, bytes.
    """
    for name, seconds in times.seconds.items():
        yield {
            "record": "time",
            "what": what,
            "case": dict(case),
            "candidate": name,
            "median": times.median(name),
            "p20": times.quantile(name, 0.2),
            "p80": times.quantile(name, 0.8),
            "clock": clock,
            **(more or {}).get(name, {}),
            "seconds": seconds,
        }


def not_timed(
    what: str, case: Mapping[str, Any], reasons: Mapping[str, str], wrong: Iterable[str] = ()
) -> Iterator[Record]:
    """A record for each candidate that was not, and whether its result was wrong."""
    wrong = set(wrong)
    for name, why in reasons.items():
        yield {
            "record": "not_timed",
            "what": what,
            "case": dict(case),
            "candidate": name,
            "why": why,
            "wrong": name in wrong,
        }
