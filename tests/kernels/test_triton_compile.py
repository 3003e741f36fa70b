"""Every Triton kernel compiled ahead of time for the GPUs we mean, in its default configuration.

No GPU is needed. The table of registers, spills, shared memory and matrix instructions is printed
(``pytest -s``) and the test fails where a default spills inside of a loop (AMD: anywhere) or takes
no matrix instruction.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from background import Said, environment
from places import SUPPORT
from programs import module

pytest.importorskip("triton")

# One dtype each, to save time: they differ in the type that the same instructions name.
PROBLEMS = ["float16:64", "bfloat16:128", "bfloat16:256"]
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
# Instructions of a warp's round over whole tiles, and clocks of shared memory: a tenth above what
# Triton 3.6 or 3.9 makes, whichever is more.
LOOPS = {
    ("cuda:80", "forward", 64): (700, 860),
    ("cuda:80", "keys", 64): (640, 1610),
    ("cuda:80", "queries", 64): (355, 790),
    ("cuda:80", "forward", 128): (630, 1000),
    ("cuda:80", "keys", 128): (560, 2230),
    ("cuda:80", "queries", 128): (590, 2200),
    ("cuda:90", "forward", 64): (575, 595),
    ("cuda:90", "keys", 64): (520, 830),
    ("cuda:90", "queries", 64): (535, 880),
    ("cuda:90", "forward", 128): (410, 615),
    ("cuda:90", "keys", 128): (605, 1320),
    ("cuda:90", "queries", 128): (415, 1020),
}
KERNELS = {"forward", "keys", "queries", "bias_gradient"}
# Of linear attention, what takes most registers: its tiles do not grow with wider heads, and what
# is computed from fp16 is multiplied in fp32.
LINEAR = {
    "linear": (["bfloat16:128", "float16:128"], {"states", "read", "decay"}),
    "channels": (["float16:128"], {"states", "pairs", "read", "channel_gradients"}),
}


def command() -> tuple[list[str], dict[str, str]]:
    """Compiles all of it."""
    tasks = [f"{target}/{problem}" for target, problems in ASKED.items() for problem in problems]
    # what takes longest first: no core waits at the end
    tasks.sort(key=lambda task: -int(task.rpartition(":")[2]))
    for kind, (problems, _) in LINEAR.items():
        tasks += [f"{target}/{problem}/{kind}" for target in ASKED for problem in problems]
    program = [sys.executable, str(SUPPORT / "triton_ahead.py"), *tasks]
    return program, environment() | {"USP_MAIN_LOOPS": "1"}


def by_target(said: Said, kind: str) -> dict[str, list[dict[str, Any]]]:
    """What the compiler says of attention's kernels, or linear attention's."""
    assert said.code == 0, said.err[-4000:]
    found: dict[str, list[dict[str, Any]]] = {target: [] for target in ASKED}
    for row in map(json.loads, said.out.splitlines()):
        if row["kind"] == kind:
            found[row["target"]].append(row)
    return found


@pytest.fixture(scope="module")
def rows(ahead_of_time: Said) -> dict[str, list[dict[str, Any]]]:
    return by_target(ahead_of_time, "")


@pytest.fixture(scope="module")
def linear_rows(ahead_of_time: Said) -> dict[str, dict[str, list[dict[str, Any]]]]:
    return {kind: by_target(ahead_of_time, kind) for kind in LINEAR}


def row_text(row: dict[str, Any]) -> str:
    matrix = ", ".join(f"{count} {name}" for name, count in row["matrix"].items())
    return (
        f"{row['target']:11} {row['kernel']:14} {row['head_dim']:4} {row['dtype']:9} "
        f"{row['registers']:4} registers {row['spilled']:4} B spilled {row['shared']:7} B shared  "
        f"{matrix}"
    )


def instructions(row: dict[str, Any]) -> set[str]:
    """Of the matrix unit, one of which a kernel must use."""
    # tiles of head dim 256 that suit wgmma would spill; halves of a chunk are 16 tokens, not 64
    is_small = row["target"] == "cuda:90" and (row["head_dim"] == 256 or row["kind"] == "channels")
    small = {"mma.sync"} if is_small else set()
    return MATRIX.get(row["target"], {"v_mfma"}) | small


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", ASKED)
def test_defaults_compile_without_spills_in_loops(target: str, rows: dict[str, Any]) -> None:
    assert_compiled(rows[target], target, KERNELS, ASKED[target])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("target", ASKED)
def test_linear_attention_compiles_without_spills(
    target: str, kind: str, linear_rows: dict[str, Any]
) -> None:
    problems, kernels = LINEAR[kind]
    assert_compiled(linear_rows[kind][target], target, kernels, problems)


def assert_compiled(
    rows: list[dict[str, Any]], target: str, kernels: set[str], problems: list[str]
) -> None:
    found = sorted(rows, key=lambda row: (row.get("head_dim", 0), row.get("dtype", "")))
    refused = [row["error"] for row in found if "error" in row]
    assert not refused, "\n".join(refused)[-4000:]
    print("", *map(row_text, found), sep="\n")
    seen = {(row["kernel"], f"{row['dtype']}:{row['head_dim']}") for row in found}
    assert seen == {(kernel, problem) for kernel in kernels for problem in problems}
    spilling = [row_text(row) for row in found if row["in_loops"]]
    assert not spilling, "\n".join(spilling)
    slow = [row_text(row) for row in found if not instructions(row) & row["matrix"].keys()]
    assert not slow, "without the matrix instructions of that GPU:\n" + "\n".join(slow)
    large = [row_text(row) for row in found if row["shared"] > SHARED[target]]
    assert not large, "\n".join(large)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_main_loops_keep_their_counts(target: str, rows: dict[str, Any]) -> None:
    """As ``usp bench machine_code`` prints them."""
    model, seen = module("_machine_code"), set()
    for row in rows[target]:
        key = (target, row["kernel"], row["head_dim"])
        if key in LOOPS:
            seen.add(key)
            code = [tuple(x) for x in row["main_loop"]]
            found = model.counts(code)
            taken = found["all"], model.cycles(target, code)["shared"]
            assert found["matrix"], row_text(row)
            assert not found.get("local"), row_text(row)
            assert all(n <= most for n, most in zip(taken, LOOPS[key], strict=True)), (key, taken)
    assert seen == {key for key in LOOPS if key[0] == target}
