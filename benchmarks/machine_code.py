"""What the GPU kernels' main loops hold, read from their machine code: no GPU needed.

Compiles the portable Triton kernels ahead of time, finds the loop over whole tiles of each, counts
its instructions, and gives the cycles that each resource needs for a round of one warp. The counts
are facts about the installed Triton's output; the cycles are a model, and nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from _machine_code import bound, counts, cycles

from usp.bench.machine import header
from usp.bench.records import write_report

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
TASKS = (
    "cuda:90/bfloat16:64",
    "cuda:90/bfloat16:128",
    "cuda:80/bfloat16:64",
    "cuda:80/bfloat16:128",
    "hip:gfx942/bfloat16:128",
)


def rows_of(tasks: list[str]) -> list[dict[str, Any]]:
    """Of each kernel of the tasks, as ``tests/support/triton_ahead.py`` compiles them."""
    if hopper := [task for task in tasks if task.endswith("/hopper")]:
        # a dispatcher's loop around those of their warps: not told apart
        raise SystemExit(f"machine_code: reads portable kernels alone, and was given {hopper}")
    command = [sys.executable, str(SUPPORT / "triton_ahead.py"), *tasks]
    done = subprocess.run(
        command, env=os.environ | {"USP_MAIN_LOOPS": "1"}, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit("machine_code: the kernels did not compile; see above")
    found = []
    for row in map(json.loads, done.stdout.splitlines()):
        if "error" in row:
            raise SystemExit(f"machine_code: {row['error']}")
        code = [tuple(x) for x in row.pop("main_loop")]
        model = cycles(row["target"], code)
        by, share = bound(model)
        found.append(row | {"counts": counts(code), "cycles": model, "bound": by, "share": share})
    return found


def text_of(row: dict[str, Any]) -> str:
    numbers = " ".join(f"{name} {n}" for name, n in row["counts"].items())
    model = " ".join(f"{name} {n:.0f}" for name, n in row["cycles"].items())
    spilled = f"{row['spilled']} B spilled" if row["spilled"] else "nothing spilled"
    return (
        f"{row['target']} {row['kernel']} {row['head_dim']}: {row['registers']} registers, "
        f"{spilled}\n  counts: {numbers}\n  model, cycles: {model}: {row['bound']} bounds, "
        f"matrix {row['share']:.0%} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=TASKS, help="such as cuda:90/bfloat16:64")
    parser.add_argument("--json", type=Path, help="write every row there")
    arguments = parser.parse_args()
    rows = rows_of(list(arguments.tasks))
    print("counts: of one warp's round of the loop over whole tiles. model: no measurement")
    print(*map(text_of, rows), sep="\n")
    if arguments.json:
        write_report(arguments.json, header("machine_code", "cpu", {}, "none"), loops=rows)


if __name__ == "__main__":
    main()
