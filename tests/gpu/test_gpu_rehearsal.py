"""What ``make test-gpu`` would run, rehearsed on a CPU: one small case of each test."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from itertools import chain
from pathlib import Path

import pytest
from background import Said, environment
from parts import taken_part
from places import ROOT

NAMES = (
    "test_gpu.py",
    "test_gpu_libraries.py",
    "test_gpu_linear.py",
    "test_gpu_offload.py",
    "test_gpu_tiles.py",
    "test_gpu_trust.py",
)
NAMES += ("test_gpu_large.py",)
FILES = [str(Path(__file__).with_name(name)) for name in NAMES]
# the kernels for Hopper alone cannot run here, and there is nothing to tune
UNREHEARSED = {"test_tuning_finds_what_runs"}


def command() -> tuple[list[str], dict[str, str]]:
    """Runs them."""
    rehearse = [sys.executable, "-m", "pytest", "-m", "gpu", "--device", "cpu", "-v", *FILES]
    return [*rehearse, "-p", "no:cacheprovider"], environment(TRITON_INTERPRET="1")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
@pytest.mark.timeout(1200)
def test_the_gpu_tests_run(rehearsal: Said) -> None:
    assert rehearsal.code == 0, rehearsal.out[-6000:] + rehearsal.err[-2000:]
    passed = set(re.findall(r"::(test_\w+).* PASSED", rehearsal.out))
    written = {n for f in FILES for n in re.findall(r"^def (test_\w+)", Path(f).read_text(), re.M)}
    assert passed == written - UNREHEARSED


def test_make_test_gpu_runs_what_is_rehearsed() -> None:
    script = (ROOT / "scripts" / "gpu_tests.sh").read_text()
    assert sorted(re.findall(r"tests/gpu/(test_\w+\.py)", script)) == sorted(NAMES)


@pytest.mark.skipif("CI" not in os.environ, reason="Triton is wanted in CI; elsewhere it may lack")
def test_ci_has_triton() -> None:
    """Else every test of its kernels would be skipped, and look like a success."""
    assert importlib.util.find_spec("triton") is not None


def test_parts_are_a_partition() -> None:
    every = [f"test {i}" for i in range(11)]
    parts = [taken_part(every, f"{k}/3") for k in (1, 2, 3)]
    assert {len(part) for part in parts} == {3, 4}
    assert sorted(chain(*parts)) == sorted(every)
