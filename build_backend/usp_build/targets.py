"""What to build: `USP_BUILD` decides, and what cannot be built is refused, not pretended."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CHOICES = ("cpu", "cuda", "hip", "none")
ROOT = Path(__file__).resolve().parents[2]


class BuildRefused(SystemExit):
    """A build that was asked for by name and cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Targets:
    """The device kinds to compile for, and whether they were asked for by name.

    What was asked for by name must succeed. What was not may fail: then usp is installed as pure
    Python, with a warning.
    """

    names: tuple[str, ...]
    explicit: bool


def _gpu_sources(root: Path) -> bool:
    return any((root / "csrc" / "gpu").glob("*.cu"))


def choose(environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> Targets:
    """Read `USP_BUILD`; unset builds the CPU kernels if it can.

    Raises:
        BuildRefused: an unknown value, or a GPU build while the sources hold no GPU kernels.
    """
    value = environ.get("USP_BUILD", "")
    if not value:
        return Targets(("cpu",), explicit=False)
    if value not in CHOICES:
        raise BuildRefused(f"USP_BUILD={value!r} is not one of {', '.join(CHOICES)}")
    if value == "none":
        return Targets((), explicit=True)
    if value == "cpu":
        return Targets(("cpu",), explicit=True)
    if not _gpu_sources(root):
        raise BuildRefused(
            f"USP_BUILD={value} asks for GPU kernels, but csrc/gpu holds no *.cu sources: they are "
            "planned, not written. On a GPU usp runs through its pure-Python backends; build with "
            "USP_BUILD=cpu or leave USP_BUILD unset."
        )
    raise BuildRefused(f"USP_BUILD={value}: this build does not know how to compile csrc/gpu yet.")
