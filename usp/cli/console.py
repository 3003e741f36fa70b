"""What the commands share: exit codes, errors, a table, ``--json``, where the package lies."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usp._version import __version__

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

PACKAGE = Path(__file__).resolve().parents[1]


class Exit(IntEnum):
    """What a command's exit code says (docs/command_line.md)."""

    RIGHT = 0
    WRONG = 1  # it ran, and found something that is not as it should be
    USAGE = 2  # it was asked for what cannot be had here
    NO_ANSWER = 3  # a process died or did not answer in time
    INTERRUPTED = 130
    BROKEN_PIPE = 141


class UserError(Exception):
    """What the user can mend: shown as one line, exit code 2."""


class NoAnswer(Exception):
    """A process died or did not answer: shown as one line, exit code 3."""


def check_seconds(seconds: float) -> None:
    """Refuse a ``--seconds`` after which nothing could end.

    Raises:
        UserError: it is not above 0 and finite.
    """
    if not 0 < seconds < math.inf:
        raise UserError(f"--seconds must be positive, got {seconds}")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Give a command ``--json [FILE]``, for ``present``."""
    action = parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="the findings as JSON in place of text; into FILE beside the text",
    )
    action.complete = {"bash": "_shtab_compgen_files", "zsh": "_files"}  # type: ignore[attr-defined]


def check_file(option: str, file: str | Path | None) -> None:
    """Refuse a file that cannot be written, before minutes go into what it is for.

    Args:
        option: By which it was named.
        file: None and "-" are none.

    Raises:
        UserError: says why.
    """
    is_first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    if file is None or str(file) == "-" or not is_first:  # which writes it
        return
    path = Path(file)
    try:
        is_new = not path.exists()
        if is_new or path.is_file() or path.is_dir():  # who reads a pipe would see its end
            path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise UserError(f"--{option}: {error}") from error


def present(
    arguments: argparse.Namespace, found: Mapping[str, Any], text: Callable[[], str]
) -> None:
    """Show what a command found, as it was asked to.

    Args:
        arguments: Parsed; ``json`` is None, "-" or a file.
        found: For a program: strings, numbers, lists and dicts of these; what is no number is
            written as null, anything else by ``str``.
        text: Makes what a person reads.

    Raises:
        UserError: the file cannot be written.
    """
    if arguments.json != "-":
        print(text())
    if arguments.json is None:
        return
    document = {"usp": __version__, "command": arguments.command, **found}
    written = json.dumps(_plain(document), indent=1, allow_nan=False)
    if arguments.json == "-":
        print(written)
        return
    try:
        Path(arguments.json).write_text(written + "\n")
    except OSError as error:
        raise UserError(f"--json: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def table(rows: Iterable[Sequence[object]], indent: str = "  ") -> str:
    """Columns of equal width; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: list[str]) -> str:
        number = [cell.replace(".", "").replace("%", "").isdigit() for cell in row]
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, number, strict=True)
        ]
        return indent + "  ".join(padded).rstrip()

    return "\n".join(map(line, cells))
