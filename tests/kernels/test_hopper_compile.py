"""The Hopper kernels compiled ahead of time for sm_90a, as their own launches call them.

No GPU is needed. The table of registers, shared memory and asynchronous instructions is printed
(``pytest -s``). The test fails where a kernel spills in its loop, or where the compiler gives up
the order of products that the kernel is made for. Each head dim is compiled in one dtype, to save
time: bf16 and fp16 differ in the type that the same instructions name.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from background import environment
from places import SUPPORT

from usp import kernels

# at 128, where registers are scarce, the forward with a state, and with a state and a result
PROBLEMS = {
    "bfloat16:128": ["forward", "forward", "keys", "queries"],
    "float16:64": ["forward", "keys", "queries"],
    "bfloat16:256": ["forward"],
}
SHARED = 227 * 1024
# Instructions of a warp's round over whole tiles: a tenth above what Triton 3.6 or 3.9 makes,
# whichever is more.
COUNTS = {
    ("forward", 64): 470,
    ("keys", 64): 295,
    ("queries", 64): 435,
    ("forward", 128): 520,
    ("keys", 128): 345,
    ("queries", 128): 305,
}


@pytest.mark.timeout(900)
@pytest.mark.skipif(not kernels.has_gluon(), reason="no Triton with Gluon for Hopper")
def test_defaults_keep_their_registers_and_their_order() -> None:
    tasks = [f"cuda:90/{problem}/hopper" for problem in PROBLEMS]
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "triton_ahead.py"), *tasks],
        env=environment(USP_MAIN_LOOPS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    refused = [row["error"] for row in rows if "error" in row]
    assert not refused, "\n".join(refused)[-4000:]
    rows.sort(key=lambda row: list(PROBLEMS).index(f"{row['dtype']}:{row['head_dim']}"))
    print("", *map(row_text, rows), sep="\n")
    seen = [(row["kernel"], f"{row['dtype']}:{row['head_dim']}") for row in rows]
    assert seen == [(kernel, problem) for problem in PROBLEMS for kernel in PROBLEMS[problem]]
    for row in rows:
        found = row["asynchronous"]
        # with Triton 3.9 dk and dv keep 16 bytes at head dim 128, before and after their loop
        assert not row["in_loops"] and row["spilled"] <= 16, row_text(row)
        assert not row["serialized"], f"products wait for each other: {row_text(row)}"
        assert found["HGMMA"] and found["UTMALDG"] and found["USETMAXREG"], row_text(row)
        assert row["shared"] <= SHARED, row_text(row)
        most = COUNTS.get((row["kernel"], row["head_dim"]))
        taken = len(row["main_loop"])
        assert most is None or taken <= most, f"{taken} in a round, not {most}: {row_text(row)}"
        # of a tile of scores just the maximum crosses threads: two halvings for each of a thread's
        # two rows, in four copies of the softmax; of the sum what is left at the end, twice;
        # and four of Triton 3.6 itself
        assert row["kernel"] != "forward" or found["SHFL"] <= 4 * 4 + 2 * 4 + 4, row_text(row)


def row_text(row: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in row["asynchronous"].items())
    return (
        f"{row['target']:8} {row['kernel']:8} {row['head_dim']:4} {row['dtype']:9} "
        f"{row['registers']:4} registers {row['spilled']:4} B spilled {row['shared']:7} B shared  "
        f"{counts}"
    )
