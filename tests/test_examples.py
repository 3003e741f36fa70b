"""The training programs: one process and several give the same losses for 50 real steps."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pool as workers
import pytest
import torch
from places import EXAMPLES

import usp

# train_vit's picture lies in its wheel
pytest.importorskip("skimage")

STEPS = 50
TOLERANCE = 1e-5
# lengths that nothing divides: 257 bytes, 7 * 11 patches
SIZES = {
    "train_lm": "--seq-len 257 --dim 32 --heads 4 --kv-heads 2 --lr 3e-3",
    "train_vit": "--rows 7 --columns 11 --dim 33 --heads 3 --batch 2 --lr 3e-3",
}


def _options(program, extra=""):
    return [*SIZES[program].split(), "--steps", str(STEPS), *extra.split()]


def _module(program):
    spec = importlib.util.spec_from_file_location(program, EXAMPLES / f"{program}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _train(program, extra, ulysses_degree, ring_degree):
    module = _module(program)
    mesh = None
    if ulysses_degree * ring_degree > 1:
        mesh = workers.mesh(ulysses_degree, ring_degree)
    return module.train(module.parse(_options(program, extra)), mesh, torch.device("cpu"))


@pytest.fixture(scope="module")
def alone(pool):
    """The losses of one process, once for each program and option."""
    return functools.cache(
        lambda program, extra="": pool.run(_train, program, extra, 1, 1, ranks=1, timeout=200)[0]
    )


def _assert_same(losses, expected):
    assert len(losses) == len(expected) == STEPS
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= TOLERANCE


@pytest.mark.parametrize("program", SIZES)
def test_the_model_learns(alone, program):
    losses, unlearned = alone(program), alone(program, "--lr 0")
    assert losses[0] == unlearned[0]
    # on the same data with the same random numbers
    assert sum(losses[-10:]) < 0.9 * sum(unlearned[-10:])


@pytest.mark.parametrize(
    ("program", "extra", "shape"),
    [
        ("train_lm", "--layout document-zigzag", (2, 2)),
        ("train_lm", "--layout zigzag", (1, 3)),
        ("train_lm", "--layout striped", (3, 2)),
        ("train_vit", "--layout contiguous", (2, 2)),
        ("train_vit", "--layout zigzag", (2, 3)),
    ],
)
def test_any_mesh_and_layout_trains_alike(pool, alone, program, extra, shape):
    for losses in pool.run(_train, program, extra, *shape, ranks=shape[0] * shape[1], timeout=200):
        _assert_same(losses, alone(program))


@pytest.mark.parametrize("program", SIZES)
def test_under_torchrun(alone, program):
    """The command of the examples' README, at a small size."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", str(EXAMPLES / f"{program}.py")]
    command += ["--ulysses", "2", "--ring", "2", "--compare", "--log-every", "1"]
    # the package under test, wherever it was imported from
    path = os.pathsep.join([str(Path(usp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [*command, *_options(program)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    printed = [float(loss) for loss in re.findall(r"^step +\d+  loss (\S+)$", run.stdout, re.M)]
    # first those of four processes, then those of one
    _assert_same(printed[:STEPS], alone(program))
    _assert_same(printed[STEPS:], alone(program))
    assert "largest difference of the loss from one process" in run.stdout
