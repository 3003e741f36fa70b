"""The host target sees when a kernel of sm_90a breaks a rule of its machine, and says which."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from gpu_host import CSRC
from places import TESTS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

WAITING = "threads wait for each other in different places, or after some have returned"
RULES = {
    "not set up": "a barrier is used that was not set up",
    "written over": "something was written over a barrier",
    "too few bytes": WAITING,
    "a phase that never ends": WAITING,
    "too many arrivals": "more arrivals at a barrier than its phase waits for",
    "misaligned": "a swizzled box is not aligned to 1024",
    "not waited for": "a block ended before its copies arrived",
    "no fence": "a product without wgmma.fence after registers were used",
    "lanes disagree": "lanes of a warpgroup describe different tiles",
    "a warp is missing": WAITING,
    "products left": "a block ended before its products",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("rules") / "gpu_host_rules"
    own = TESTS / "cpp" / "gpu_host_rules.cpp"
    sources = [own, CSRC / "gpu" / "host" / "simt.cpp", CSRC / "gpu" / "host" / "hopper.cpp"]
    command = ["g++", "-std=c++20", "-O1", "-DUSP_GPU_HOST_WAVE=32", f"-I{CSRC}"]
    subprocess.run([*command, *map(str, sources), "-o", str(built)], check=True)
    return built


def run(program: Path, rule: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), rule], capture_output=True, text=True, timeout=60)


def test_a_kernel_that_keeps_the_rules_runs(program: Path) -> None:
    done = run(program, "none")
    assert (done.returncode, done.stdout) == (0, "done\n")


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_ends_the_program(rule: str, program: Path) -> None:
    done = run(program, rule)
    assert done.returncode != 0
    assert done.stderr == f"usp host target: {RULES[rule]}\n"
