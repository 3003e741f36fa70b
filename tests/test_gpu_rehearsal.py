"""What ``make test-gpu`` would run, rehearsed on a CPU: one small case of each test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import taken_part

TESTS = Path(__file__).resolve().parent
# the kernels for Hopper alone cannot run here, and there is nothing to tune
UNREHEARSED = {"test_tuning_finds_what_runs"}


@pytest.mark.timeout(600)
def test_the_gpu_tests_run() -> None:
    pytest.importorskip("triton")
    paths = os.pathsep.join(folder for folder in sys.path if folder)
    files = [str(TESTS / name) for name in ("test_gpu.py", "test_gpu_large.py")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--device", "cpu", "-v", *files]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env=os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = set(re.findall(r"::(test_\w+).* PASSED", done.stdout))
    written = {n for f in files for n in re.findall(r"^def (test_\w+)", Path(f).read_text(), re.M)}
    assert passed == written - UNREHEARSED


def test_parts_are_a_partition() -> None:
    every = [f"test {i}" for i in range(11)]
    parts = [taken_part(every, f"{k}/3") for k in (1, 2, 3)]
    assert {len(part) for part in parts} == {3, 4}
    assert sorted(sum(parts, [])) == sorted(every)
