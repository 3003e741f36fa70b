"""``usp.verify`` on processes of its own, and what it says of ranks that raise or wait."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import verify_models as models
import verify_programs as programs
from places import TESTS
from torch import nn

import usp
from usp import cli


def test_a_right_model_and_a_wrong_one(capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(TESTS / "support"))
    code = cli.main(["verify", "verify_programs:right", "--ulysses", "1", "--layout", "zigzag"])
    said = capsys.readouterr().out
    assert code == 0
    assert re.fullmatch(r"the same: 27 outputs and gradients within 1e-09 in float64\n", said)
    began = time.monotonic()
    assert cli.main(["verify", "verify_programs:wrong", "--ulysses", "1"]) == 1
    assert time.monotonic() - began < 60
    said = capsys.readouterr().out
    assert re.match(r"tail\.inner: the output differs \(\d.\de-\d\d of its largest value", said)
    assert "Likely: statistics over local tokens" in said
    for name, message in (
        ("verify_programs", "takes PACKAGE:FACTORY"),
        ("no_such_package:make", "cannot find no_such_package:make"),
        ("verify_programs:raises", r"raises TypeError: raises\(\) .*, line [0-9]+"),
        ("verify_programs:nothing", "must return .model, inputs., .* got int"),
        ("verify_programs:right --seconds 0", "seconds must be positive, got 0.0"),
        ("verify_programs:right --ring 1 --ulysses 1", "of 2 ranks or more"),
        ("verify_programs:right --trunk layers", "Encoder has no module 'layers'; .*it has"),
        ("verify_programs:unknown", "the trunk of Short is not known: name the modules"),
    ):
        assert cli.main(["verify", *name.split()]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_what_a_rank_raises_is_a_verdict() -> None:
    model, x = programs.refused()
    found = usp.verify(model, x, (1, 2))
    assert not found and (found.kind, found.module) == ("error", "encoder.layers.1.norm2")
    assert "NotImplementedError: encoder.layers holds modules" in str(found)
    model, x = programs.right()
    found = usp.verify(model, x, (1, 2), sharded=programs.raises)
    assert (found.kind, found.module) == ("error", "encoder.layers.1.linear1")
    assert "rank 1: ArithmeticError: of this rank alone" in found.cause


@pytest.mark.long
def test_ranks_that_wait_for_ever_are_a_verdict() -> None:
    model, x = programs.right()
    found = usp.verify(model, x, (1, 2), sharded=programs.skips, seconds=5)
    assert (found.kind, found.ok) == ("hang", False)
    assert re.search(r"no further in 5 s, rank 0 in .+, rank 1 in encoder.layers.1", found.cause)


PROGRAM = """
import torch, usp
from torch import nn

model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 1)
print(usp.verify(model, torch.randn(5, 2, 8)))
"""
TYPED = """
import usp
from torch import nn

class Mine(nn.Linear):
    pass

usp.verify(Mine(2, 2), None)
"""


@pytest.mark.long
def test_programs_that_other_processes_cannot_run(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    said = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert 'outside of `if __name__ == "__main__":` would call it again' in said.stdout
    said = subprocess.run([sys.executable, "-c", TYPED], capture_output=True, text=True)
    assert "TypeError: Mine cannot be found by other processes" in said.stderr


def test_random_numbers_of_the_model_itself_are_named() -> None:
    model = models.Encoder(programs.Noise())
    found = usp.verify(model, models.wide(), (1, 2))
    assert (found.kind, found.module) == ("random", "tail")
    assert "call model.eval()" in str(found)


def test_a_model_without_fp64_runs_in_its_own_dtype() -> None:
    found = usp.verify(models.Encoder(programs.Short()), models.wide(), (1, 2))
    assert found.kind != "error" and found.dtype == torch.float32


def test_what_cannot_be_handed_over_is_refused() -> None:
    model, x = programs.right()
    with pytest.raises(TypeError, match="sharded cannot be handed to other processes"):
        usp.verify(model, x, sharded=lambda model, mesh: model)
    with pytest.raises(ValueError, match="the whole model raises on one device, RuntimeError"):
        usp.verify(nn.Linear(3, 3), x)
    assert model.training and not any(p.grad is not None for p in model.parameters())
