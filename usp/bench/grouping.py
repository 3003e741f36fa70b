"""Records side by side: who took part in a case, which sizes of the cases differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from usp.bench.records import Record
from usp.bench.timing import paired_ratio

ROOFS = ("matmul", "copy")


@dataclass
class Row:
    """One case: the record of each candidate."""

    case: dict[str, Any]
    by_name: dict[str, Record] = field(default_factory=dict)

    def ratio(self, over: str, under: str) -> float | None:
        """Median over rounds of time(over) / time(under); None where one was not timed."""
        a, b = (self.by_name.get(name, {}).get("seconds") or [] for name in (over, under))
        return paired_ratio(a, b) if a and len(a) == len(b) else None


@dataclass
class Group:
    """All cases of one ``what``."""

    what: str
    rows: list[Row] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Candidates that were timed somewhere, in order."""
        return list(
            dict.fromkeys(
                name
                for row in self.rows
                for name, record in row.by_name.items()
                if record["record"] == "time"
            )
        )

    @property
    def same(self) -> dict[str, Any]:
        """What all cases share."""
        first, *others = (row.case for row in self.rows)
        return {k: v for k, v in first.items() if all(case.get(k) == v for case in others)}

    @property
    def differ(self) -> list[str]:
        """Names of what they do not share."""
        fields = dict.fromkeys(key for row in self.rows for key in row.case)
        return [key for key in fields if key not in self.same]


def grouped(records: Iterable[Record]) -> list[Group]:
    """Of ``time`` and ``not_timed`` records: by ``what``, then by case."""
    groups: dict[str, Group] = {}
    for record in records:
        if record["record"] not in ("time", "not_timed"):
            continue
        group = groups.setdefault(record["what"], Group(record["what"]))
        row = next((row for row in group.rows if row.case == record["case"]), None)
        if row is None:
            row = Row(record["case"])
            group.rows.append(row)
        row.by_name[record["candidate"]] = record
    return list(groups.values())


def key_of(record: Record) -> tuple[Any, ...]:
    """What makes two records of two files those of the same measurement."""
    return record["what"], record["candidate"], tuple(sorted(record["case"].items()))
