"""flash-attn 4's own kernels, compiled for Hopper through its adapter without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT, SUPPORT

import usp

FOLDER = ROOT / "build" / "flash-attn-4"


@pytest.mark.library
@pytest.mark.timeout(600)
def test_its_kernels_compile_and_answer_in_the_promised_shapes() -> None:
    if not (FOLDER / "wanted").is_file():
        pytest.skip(
            "flash-attn-4 is not installed: scripts/libraries.sh VENV flash-attn-4 (320 MB)"
        )
    package = Path(usp.__file__).resolve().parents[1]
    paths = [str(package), str(SUPPORT), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "flash4_compiled.py"), str(FOLDER)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert found.pop("lacking") == []
    packed = found.pop("packed")
    assert packed == [[600, 8, 64], [8, 600], [600, 8, 64], [600, 2, 64], [600, 2, 64]]
    dense = [[2, 300, 8, 64], [2, 8, 300], [2, 300, 8, 64], [2, 300, 2, 64], [2, 300, 2, 64]]
    assert found == dict.fromkeys(("full", "causal", "band", "left", "softcap"), dense)
