"""What the GPU kernels' main loops hold, read from their machine code: no GPU needed.

Compiles the Triton kernels ahead of time, portable ones and those for Hopper, and the C++ kernels
where there is a compiler for them; finds the loop over whole tiles of each, counts the instructions
of a round, and gives the cycles that each resource needs for a round of one warp. The counts are
facts about the output of the compilers here; the cycles are a model, and nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _machine_code import bound, counts, cycles

from usp.bench.machine import header
from usp.bench.records import write_report

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
TRITON = (
    *("cuda:90/bfloat16:64", "cuda:90/bfloat16:128", "cuda:80/bfloat16:64", "cuda:80/bfloat16:128"),
    *("hip:gfx942/bfloat16:128", "cuda:90/bfloat16:64/hopper", "cuda:90/bfloat16:128/hopper"),
)
CSRC = tuple(
    f"{target}/bfloat16:{head_dim}/csrc"
    for target in ("cuda:90", "cuda:80", "hip:gfx942", "hip:gfx90a")
    for head_dim in (64, 128)
)


def triton_rows(tasks: list[str]) -> list[dict[str, Any]]:
    """As ``tests/support/triton_ahead.py`` compiles them."""
    command = [sys.executable, str(SUPPORT / "triton_ahead.py"), *tasks]
    done = subprocess.run(
        command, env=os.environ | {"USP_MAIN_LOOPS": "1"}, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit("machine_code: the kernels did not compile; see above")
    return [json.loads(line) for line in done.stdout.splitlines()]


def csrc_rows(tasks: list[str]) -> list[dict[str, Any]]:
    """As ``tests/support/csrc_loops.py`` compiles them, where there is a compiler."""
    sys.path[:0] = [str(SUPPORT), str(SUPPORT.parents[1] / "build_backend")]
    from csrc_loops import rows_of
    from usp_build.toolchains import Missing

    asked = dict[str, set[int]]()
    for target, problem, _ in (task.split("/") for task in tasks):
        asked.setdefault(target, set()).add(int(problem.partition(":")[2]))
    found = []
    for target, head_dims in asked.items():
        try:
            with tempfile.TemporaryDirectory() as folder:
                found += rows_of(target, head_dims, Path(folder))
        except Missing as missing:
            print(f"machine_code: no C++ kernels for {target}: {missing}", file=sys.stderr)
    return found


def rows_of(tasks: list[str]) -> list[dict[str, Any]]:
    """Of each kernel of the tasks."""
    csrc = [task for task in tasks if task.endswith("/csrc")]
    others = [task for task in tasks if task not in csrc]
    compiled = [("C++", row) for row in (csrc_rows(csrc) if csrc else [])]
    for row in triton_rows(others) if others else []:
        if "error" in row:
            raise SystemExit(f"machine_code: {row['error']}")
        compiled.append(("Gluon" if "asynchronous" in row else "Triton", row))
    found = []
    for by, row in compiled:
        code = [tuple(x) for x in row.pop("main_loop")]
        model = cycles(row["target"], code)
        most, share = bound(model)
        found.append({"by": by} | row | {"counts": counts(code), "cycles": model})
        found[-1] |= {"bound": most, "share": share}
    return found


def text_of(row: dict[str, Any]) -> str:
    numbers = " ".join(f"{name} {n}" for name, n in row["counts"].items())
    model = " ".join(f"{name} {n:.0f}" for name, n in row["cycles"].items())
    # the C++ kernels' are printed by the tests of their builds
    spilled = f"{row['spilled']} B spilled" if row.get("spilled") else "nothing spilled"
    held = f": {row['registers']} registers, {spilled}" if "registers" in row else ""
    return (
        f"{row['by']} {row['target']} {row['kernel']} {row['head_dim']}{held}\n"
        f"  counts: {numbers}\n  model, cycles: {model}: {row['bound']} bounds, "
        f"matrix {row['share']:.0%} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    about = (
        "such as cuda:90/bfloat16:64; with /hopper those in Gluon, with /csrc those in C++ (bf16)"
    )
    parser.add_argument("tasks", nargs="*", default=(*TRITON, *CSRC), help=about)
    parser.add_argument("--json", type=Path, help="write every row there")
    arguments = parser.parse_args()
    rows = rows_of(list(arguments.tasks))
    print("counts: of one warp's round of the loop over whole tiles. model: no measurement")
    print(*map(text_of, rows), sep="\n")
    if arguments.json:
        write_report(arguments.json, header("machine_code", "cpu", {}, "none"), loops=rows)


if __name__ == "__main__":
    main()
