"""Where things lie in the source tree."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
SUPPORT = TESTS / "support"
CSRC = ROOT / "csrc"
BENCHMARKS = ROOT / "benchmarks"
EXAMPLES = ROOT / "examples"
