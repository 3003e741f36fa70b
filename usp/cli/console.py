"""What the commands share: a table, an error that the user can mend, where the package lies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


class UserError(Exception):
    """What the user can mend: shown as one line, exit code 2."""


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
