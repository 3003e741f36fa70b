"""The machine at hand as a cluster: what ``usp plan --calibrate`` has measured and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from usp.machine import kept
from usp.planning.choose.cluster import Cluster, Link

NAME = "here"
_FILE = "usp_plan.json"


def file() -> Path:
    """Where it is kept."""
    return kept.folder() / _FILE


def keep(found: dict[str, Any]) -> None:
    """Keep what was measured: the arguments of ``Cluster`` and of its ``Link``."""
    kept.add(file(), {NAME: found})


def measured_here() -> Cluster | None:
    """What was kept; None where nothing was, or nothing that this version knows."""
    found = kept.read(file()).get(NAME)
    try:
        return cluster_from(found) if found else None
    except (KeyError, TypeError, ValueError):
        return None


def cluster_from(found: dict[str, Any]) -> Cluster:
    """A cluster from plain numbers."""
    levels = tuple(Link(**link) for link in found["levels"])
    return Cluster(**{"device": "cpu", **found, "levels": levels})
