"""Every Triton kernel compiled ahead of time for the GPUs we mean, in its default configuration.

No GPU is needed. The table of registers, spills, shared memory and matrix instructions is printed
(``pytest -s``) and the test fails where a default spills or takes no matrix instruction.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).resolve().parent
PROBLEMS = [f"{dtype}:{dim}" for dim in (64, 128) for dtype in ("bfloat16", "float16")]
# What the shared memory of one program may take, in bytes.
SHARED = {
    "cuda:80": 163 * 1024,
    "cuda:90": 227 * 1024,
    "cuda:100": 227 * 1024,
    "hip:gfx90a": 64 * 1024,
    "hip:gfx942": 64 * 1024,
    "hip:gfx950": 160 * 1024,
}
MATRIX = {
    "cuda:80": {"mma.sync"},
    "cuda:90": {"wgmma.mma_async"},
    "cuda:100": {"tcgen05.mma", "mma.sync"},
}
# Two of them are no family of their own yet: one head dim shows that their compiler takes us.
ASKED = dict.fromkeys(SHARED, PROBLEMS) | {
    "cuda:100": ["bfloat16:128"],
    "hip:gfx950": ["bfloat16:128"],
}
KERNELS = {"forward", "keys", "queries", "bias_gradient"}


@pytest.fixture(scope="module")
def compilers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One process a target, all at once; a fresh cache, so that every kernel is compiled."""
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "OMP_NUM_THREADS": "1",
    }
    # usp from where it came from here
    environment["PYTHONPATH"] = os.pathsep.join(folder for folder in sys.path if folder)
    command = [sys.executable, str(TESTS / "triton_ahead.py")]
    started = {
        target: subprocess.Popen(
            [*command, target, *problems],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for target, problems in ASKED.items()
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


def row_text(row: dict[str, Any]) -> str:
    matrix = ", ".join(f"{count} {name}" for name, count in row["matrix"].items())
    return (
        f"{row['target']:11} {row['kernel']:14} {row['head_dim']:4} {row['dtype']:9} "
        f"{row['registers']:4} registers {row['spilled']:4} B spilled {row['shared']:7} B shared  "
        f"{matrix}"
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ASKED)
def test_defaults_compile_without_spills(target: str, compilers: dict[str, Any]) -> None:
    out, err = compilers[target].communicate()
    assert compilers[target].returncode == 0, err[-4000:]
    rows = [json.loads(line) for line in out.splitlines()]
    print("", *map(row_text, rows), sep="\n")
    seen = {(row["kernel"], f"{row['dtype']}:{row['head_dim']}") for row in rows}
    assert seen == {(kernel, problem) for kernel in KERNELS for problem in ASKED[target]}
    spilling = [row_text(row) for row in rows if row["spilled"]]
    assert not spilling, "\n".join(spilling)
    expected = MATRIX.get(target, {"v_mfma"})
    slow = [row_text(row) for row in rows if not expected & row["matrix"].keys()]
    assert not slow, f"none of {expected}:\n" + "\n".join(slow)
    large = [row_text(row) for row in rows if row["shared"] > SHARED[target]]
    assert not large, "\n".join(large)
