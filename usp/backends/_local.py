"""Which backend was fastest on this very machine: what ``usp tune`` found, kept for its user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from usp.machine import kept
from usp.machine.place import place


@dataclass(frozen=True)
class LocalRow:
    """What was measured here.

    Attributes:
        order: Names of backends, the fastest first.
        date: When, UTC.
        times: Of each, the mean time over that of the fastest.
    """

    order: tuple[str, ...]
    date: str
    times: tuple[float, ...]


def store() -> Path:
    """The file."""
    return kept.folder() / "usp-orders.json"


_recalled: dict[tuple[torch.device, tuple[str, ...]], LocalRow | None] = {}
_changes = 0


def changes() -> int:
    """How often rows have changed in this process."""
    return _changes


def _changed() -> None:
    global _changes
    _changes += 1


def recall(device: torch.device, packages: Sequence[str]) -> LocalRow | None:
    """The row of a device, if it was measured with this driver and these versions.

    Args:
        packages: Distributions whose versions matter.
    """
    key = device, tuple(packages)
    if key not in _recalled:
        _recalled[key] = _row(_read(device, packages))
    return _recalled[key]


def keep(device: torch.device, packages: Sequence[str], row: LocalRow) -> None:
    """For this process, and for later ones.

    Raises:
        OSError: the file cannot be written; this process has the row all the same.
    """
    _recalled[device, tuple(packages)] = row
    _changed()
    kept.add(store(), {place(device, packages): asdict(row)})


def drop(device: torch.device, packages: Sequence[str]) -> None:
    """The device is as if it had not been measured.

    Raises:
        OSError: the file cannot be written.
    """
    _recalled[device, tuple(packages)] = None
    _changed()
    if store().is_file():
        kept.add(store(), {place(device, packages): None})


def forget() -> None:
    """Look the rows up anew."""
    _recalled.clear()
    _changed()


def _read(device: torch.device, packages: Sequence[str]) -> Any:
    # most have no file; and a fake tensor may be on a GPU that is not there
    if not store().is_file() or (device.type == "cuda" and not torch.cuda.is_available()):
        return None
    return kept.read(store()).get(place(device, packages))


def _row(found: Any) -> LocalRow | None:
    """As the file has it; None where it is not what ``keep`` writes."""
    try:
        order, times = tuple(map(str, found["order"])), tuple(map(float, found["times"]))
        return LocalRow(order, str(found["date"]), times)
    except (TypeError, KeyError, ValueError):
        return None
