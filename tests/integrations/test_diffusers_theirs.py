"""diffusers' own tests of context parallelism, by our backend on gloo.

Their wheel does not hold them: they run where a checkout of the library is.
"""

from __future__ import annotations

import os
import subprocess
import sys

import libraries
import pytest
from places import ROOT, TESTS

pytestmark = pytest.mark.library
CHECKOUT = ROOT / "build" / "diffusers"
WHERE = "git clone --depth 1 https://github.com/huggingface/diffusers build/diffusers"


@pytest.mark.parametrize("model", ["flux", "flux2", "qwenimage"])
def test_their_parallel_tests(model) -> None:
    libraries.library("diffusers")
    if not (CHECKOUT / "tests").is_dir():
        pytest.skip(f"their tests are not there: {WHERE}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["-p", "diffusers_theirs", "-k", "ContextParallel and not AttnBackends"]
    ran = subprocess.run(
        [*command, f"tests/models/transformers/test_models_transformer_{model}.py"],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": f"{TESTS / 'support'}:{ROOT}", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    # inference and backward, one sample and two, and a mesh of three axes: each by ring and Ulysses
    assert "10 passed" in ran.stdout, ran.stdout[-4000:] + ran.stderr[-4000:]
    assert ran.returncode == 0
