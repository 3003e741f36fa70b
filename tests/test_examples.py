"""The README's example is exact; the training programs give one process's losses on any mesh."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import example_programs as examples
import pytest
from launched import launched
from places import EXAMPLES, ROOT
from pool import Pool

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
    """The later of two values of an option counts."""
    return [*SIZES[program].split(), "--steps", str(STEPS), *extra.split()]


@pytest.fixture(scope="module")
def alone(pool):
    """The losses of one process, once for each program and option."""

    def losses(program, extra=""):
        options = _options(program, extra)
        return pool.run(examples.train, program, options, 1, 1, ranks=1)[0]

    return functools.cache(losses)


def _assert_same(losses, expected, steps=STEPS):
    assert len(losses) == steps
    assert examples.largest_difference(losses, expected[:steps]) <= TOLERANCE


@pytest.mark.parametrize("program", SIZES)
def test_the_model_learns(alone, program):
    losses, unlearned = alone(program), alone(program, "--lr 0")
    assert losses[0] == unlearned[0]
    # on the same data with the same random numbers
    assert sum(losses[-10:]) < 0.9 * sum(unlearned[-10:])


@pytest.mark.parametrize(
    ("program", "extra", "shape", "steps"),
    [
        pytest.param(
            *("train_lm", "--layout document-zigzag", (2, 2), STEPS), marks=pytest.mark.long
        ),
        ("train_lm", "--layout zigzag", (1, 3), 20),
        ("train_lm", "--layout striped", (3, 2), 20),
        pytest.param(*("train_vit", "--layout contiguous", (2, 2), STEPS), marks=pytest.mark.long),
        ("train_vit", "--layout zigzag", (2, 3), 20),
    ],
)
def test_any_mesh_and_layout_trains_alike(pool, alone, program, extra, shape, steps):
    options = _options(program, f"{extra} --steps {steps}")
    ranks = shape[0] * shape[1]
    for losses in pool.run(examples.train, program, options, *shape, ranks=ranks):
        _assert_same(losses, alone(program), steps)


@pytest.mark.long
@pytest.mark.parametrize("program", SIZES)
def test_training_goes_on_on_another_mesh(pool, alone, program, tmp_path) -> None:
    """Three ranks save, four go on, one goes on from there, and one finds nothing left to do."""
    layout = "contiguous" if program == "train_vit" else "document-zigzag"
    folder = ["--save", str(tmp_path), "--resume", str(tmp_path)]
    for steps, shape, how in [(4, (1, 3), "zigzag"), (8, (2, 2), layout), (11, (1, 1), "striped")]:
        options = _options(program, f"--steps {steps} --save-every 3 --layout {how}") + folder
        ranks = shape[0] * shape[1]
        for losses in pool.run(examples.train, program, options, *shape, ranks=ranks):
            _assert_same(losses, alone(program), steps)
    assert sorted(found.name for found in tmp_path.iterdir()) == [
        f"step-{step:06}" for step in (3, 4, 6, 8, 9, 11)
    ]
    (losses,) = pool.run(examples.train, program, options, 1, 1, ranks=1)
    _assert_same(losses, alone(program), 11)


# One rank asks the oracle: it takes longer than all the rest.
CHECK = """
import torch.distributed as dist
from usp.testing import dense_attention
expected, wanted = torch.empty(2, *whole.shape, dtype=torch.float64)
if mesh.rank == 0:
    torch.manual_seed(0)
    tokens = torch.randn(1, 1009, 8, 64).double().requires_grad_()
    expected, _ = dense_attention(tokens, tokens, tokens, causal=True)
    expected.square().mean().backward()
    expected, wanted = expected.detach().contiguous(), tokens.grad
dist.broadcast(expected, 0)
dist.broadcast(wanted, 0)
torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-5)
grad = usp.shard_sequence(wanted, mesh, dim=1, layout="zigzag")
torch.testing.assert_close(x.grad.double(), grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))
print(f"rank {mesh.rank} of {mesh.size} agrees")
"""


@pytest.mark.long
def test_under_torchrun(alone, tmp_path):
    """The README's example as it stands there, and the commands of the examples' README, small.

    The pool trains on this mesh for longer; here what torchrun and the command line add.
    """
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    example = tmp_path / "example.py"
    example.write_text(next(block for block in blocks if "init_mesh" in block) + CHECK)
    steps = 5
    more = f"--steps {steps} --ulysses 2 --ring 2 --compare --log-every 1"
    programs = [[str(EXAMPLES / f"{name}.py"), *_options(name, more)] for name in SIZES]
    said, *trained = launched(4, [[str(example)], *programs])
    # not by lines: processes that print at once may share one
    assert sorted(re.findall(r"rank \d of 4 agrees", said)) == [
        f"rank {r} of 4 agrees" for r in range(4)
    ]
    for program, printed in zip(SIZES, trained, strict=True):
        losses = [float(loss) for loss in re.findall(r"^step +\d+  loss (\S+)$", printed, re.M)]
        # first those of four processes, then those of one
        _assert_same(losses[:steps], alone(program), steps)
        _assert_same(losses[steps:], alone(program), steps)
        assert "largest difference of the loss from one process" in printed


@pytest.fixture
def eight():
    pool = Pool(size=8)
    yield pool
    pool.close()


@pytest.mark.long
def test_every_kind_of_parallelism_at_once(eight, tmp_path):
    """On 8 processes each axis once beside each kind of the others; the second mesh goes on where
    the first ended, and one process where that did."""
    told = "--seq-len 61 --dim 32 --batch 4 --micro-batches 2 --device cpu"
    small = told.split()
    alone = eight.run(examples.train_hybrid, [*small, "--steps", "7"], ranks=1)[0]
    folder = ["--save", str(tmp_path), "--resume", str(tmp_path)]
    for mesh, ranks, steps in (
        ("--pipeline 2 --ring 2 --tensor 2", 8, 3),
        ("--data 2 --ulysses 2 --tensor 2", 8, 6),
        ("", 1, 7),
    ):
        options = [*small, *mesh.split(), "--steps", str(steps), *folder]
        for losses in eight.run(examples.train_hybrid, options, ranks=ranks):
            _assert_same(losses, alone, steps)
    assert alone[6] < alone[0] - 0.1


@pytest.mark.long
def test_the_hybrid_program_draws_and_compares(tmp_path, monkeypatch, capsys):
    """And has a bar in a terminal, as all of them."""
    picture = tmp_path / "loss.png"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    told = "--seq-len 31 --dim 16 --batch 2 --heads 2 --steps 2 --compare --device cpu --plot"
    monkeypatch.setattr(sys, "argv", ["train_hybrid.py", *told.split(), str(picture)])
    assert examples.module("train_hybrid").main() == 0
    assert picture.stat().st_size > 5000
    assert re.search(r"\r\[={15} {15}\] 1/2  loss \d", capsys.readouterr().err)


# what the scripts find on a cluster: so many tasks of srun, which all run here
CLUSTER = {
    "srun": """
        while [ "$1" != bash ]; do shift; done
        for ((n = 0; n < SLURM_NTASKS; n++)); do
          SLURM_PROCID=$n SLURM_LOCALID=$n "$@" & tasks+=($!)
        done
        for task in "${tasks[@]}"; do wait "$task" || exit; done""",
    "scontrol": "echo localhost",
    "hostname": "echo 127.0.0.1",
    "module": "true",
    "activate": "true",
    "python": f'exec {sys.executable} "$@"',
}


@pytest.mark.long
def test_batch_scripts_train_and_go_on(alone, tmp_path) -> None:
    for name, text in CLUSTER.items():
        file = tmp_path / name
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
    told = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "USP_RUNS": str(tmp_path / "runs")}
    told |= {"PYTHONPATH": str(Path(usp.__file__).parents[1]), "USP_ENVIRONMENT": "usp"}
    told |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    told |= {"SLURM_JOB_ID": str(os.getpid()), "CUDA_VISIBLE_DEVICES": ""}
    printed = ""
    for script, ranks, steps in (("plain", 2, 3), ("frontier", 1, 5)):
        command = ["bash", str(EXAMPLES / "slurm" / f"{script}.sh"), str(EXAMPLES / "train_lm.py")]
        command += _options("train_lm", f"--steps {steps} --ring {ranks} --log-every 1")
        environment = os.environ | told | {"SLURM_NTASKS": str(ranks)}
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=250, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr
        printed += run.stdout
    losses = [float(loss) for loss in re.findall(r"^step +\d+  loss (\S+)$", printed, re.M)]
    _assert_same(losses, alone("train_lm"), 5)
    assert "going on behind step 3" in printed
    picture = (tmp_path / "runs" / "train_lm" / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
