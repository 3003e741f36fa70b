"""Pieces of assembly, executed by the interpreter of AMD's machine code in tests of it."""

from __future__ import annotations

import numpy as np
from gcn.machine import Program, run_waves
from gcn.memory import Lds, Memory
from gcn.wave import LANES, Wave
from numpy.typing import NDArray

RANDOM = np.random.default_rng(7)
LANE = np.arange(LANES)


def wave(late: bool = True, lds: Lds | None = None, memory: Memory | None = None) -> Wave:
    return Wave(memory or Memory(), lds or Lds(4096), late)


def program(text: str) -> Program:
    lines = (line.strip() for line in text.splitlines())
    return Program.of_text("\n".join(x if x.startswith(".L") else f"\t{x}" for x in lines))


def run(text: str, *waves: Wave) -> Wave:
    """To the end of the text; returns the first wave."""
    given = list(waves) or [wave()]
    run_waves(program(f"{text}\ns_endpgm"), given)
    return given[0]


def numbers(count: int = LANES) -> NDArray[np.float32]:
    return RANDOM.standard_normal(count).astype(np.float32)


def integers() -> NDArray[np.uint32]:
    return RANDOM.integers(0, 2**32, LANES, dtype=np.uint32)
