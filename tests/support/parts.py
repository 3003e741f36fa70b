"""Tests shared out among processes."""

from __future__ import annotations

from typing import Any


def taken_part(items: list[Any], part: str | None) -> list[Any]:
    """The K-th of N parts, for "K/N"; everything for None."""
    if part is None:
        return items
    k, n = map(int, part.split("/"))
    return items[k - 1 :: n]
