"""What the programs that show a file of results share: its arguments, and reading it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from usp.bench import machine
from usp.bench.grouping import Group, grouped
from usp.bench.options import BenchError
from usp.bench.records import Report, Unreadable, read


def shown_parser(program: str, doc: str | None) -> argparse.ArgumentParser:
    """FILE, and ``--what`` of it."""
    made = argparse.ArgumentParser(
        prog=f"usp bench {program}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("file", type=Path)
    made.add_argument("--what", nargs="+", help="only these")
    return made


def load(file: Path) -> Report:
    """The results of a file.

    Raises:
        BenchError: it holds none.
    """
    try:
        return read(file)
    except Unreadable as error:
        raise BenchError(str(error)) from error


def groups_of(report: Report, what: Sequence[str] | None) -> list[Group]:
    """What was timed, or some of it."""
    return [group for group in grouped(report.records) if what is None or group.what in what]


def in_words(report: Report) -> tuple[str, str]:
    """The program; when and where it ran."""
    head = report.header
    return f"usp bench {head['program']}", f"{head['date'][:10]}: {machine.in_words(head)}"
