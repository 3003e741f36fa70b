"""The README's example runs as it stands there, under torchrun, and is exact."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

import usp

CHECK = """
from usp.testing import dense_attention
torch.manual_seed(0)
tokens = torch.randn(1, 1009, 8, 64).double().requires_grad_()
expected, _ = dense_attention(tokens, tokens, tokens, causal=True)
torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-5)
expected.square().mean().backward()
grad = usp.shard_sequence(tokens.grad, mesh, dim=1, layout="zigzag")
torch.testing.assert_close(x.grad.double(), grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))
print(f"rank {mesh.rank} of {mesh.size} agrees")
"""


def test_the_example_runs_under_torchrun(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    example = next(block for block in blocks if "init_mesh" in block)
    program = tmp_path / "example.py"
    program.write_text(example + CHECK)
    home = str(Path(usp.__file__).resolve().parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "4", str(program)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": home, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(done.stdout.split("\n"))[-4:] == [f"rank {r} of 4 agrees" for r in range(4)]


@pytest.mark.parametrize("name", re.findall(r"usp\.(\w+)\(", (ROOT / "README.md").read_text()))
def test_names_in_the_readme_exist(name: str) -> None:
    assert hasattr(usp, name)


def test_plan_command_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    from usp import cli

    (line,) = re.findall(r"^usp (plan .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert cli.main(line.split()) == 0
    assert "ring rank 7" in capsys.readouterr().out


def test_layouts_picture() -> None:
    """The table of who holds which token is what the layouts say."""
    from usp.planning.layout import rows

    text = (ROOT / "README.md").read_text()
    layouts: dict[str, str | usp.DocumentZigzag] = {
        "contiguous": "contiguous",
        "zigzag": "zigzag",
        "striped": "striped",
        "documents": usp.DocumentZigzag((0, 8, 16)),
    }
    for name, layout in layouts.items():
        (line,) = re.findall(rf"^{name} +([\d |]+)", text, re.MULTILINE)
        held = [0] * 16
        for rank, row in enumerate(rows(layout, 16, 4)):
            for position in row.tensor.tolist():
                held[position] = rank
        assert [int(number) for number in re.findall(r"\d", line)] == held, name
