"""The benchmark programs, to be imported or run."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from places import BENCHMARKS

import usp


def module(name: str) -> Any:
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


def program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    package = Path(usp.__file__).resolve().parents[1]  # the usp that is tested, wherever it lies
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
