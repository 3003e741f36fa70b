"""What to build: `USP_BUILD` decides, and what cannot be built is refused, not pretended."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import toolchains

CHOICES = ("cpu", "cuda", "hip", "none")
ROOT = Path(__file__).resolve().parents[2]


class BuildRefused(SystemExit):
    """A build that was asked for by name and cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Targets:
    """The device kinds to compile for, and whether they were asked for by name.

    What was asked for by name must succeed. What was not may fail: then usp is installed without
    its GPU kernels, or as pure Python, with a warning.
    """

    names: tuple[str, ...]
    explicit: bool

    @property
    def attempts(self) -> tuple[tuple[str, ...], ...]:
        """What to try to build, in this order, until it succeeds."""
        if self.explicit or len(self.names) < 2:
            return (self.names,)
        return (self.names, self.names[:1])


def choose(environ: Mapping[str, str] = os.environ) -> Targets:
    """Read `USP_BUILD`; unset builds for the CPU, and for the GPU of this machine.

    Raises:
        BuildRefused: an unknown value.
    """
    value = environ.get("USP_BUILD", "")
    if not value:
        # One device kind a build: two runtimes in one process would be none of torch's.
        present = [kind for kind in toolchains.KINDS if toolchains.gpu_present(kind)]
        return Targets(("cpu", *present[:1]), explicit=False)
    if value not in CHOICES:
        raise BuildRefused(f"USP_BUILD={value!r} is not one of {', '.join(CHOICES)}")
    if value == "none":
        return Targets((), explicit=True)
    return Targets(("cpu",) if value == "cpu" else ("cpu", value), explicit=True)
