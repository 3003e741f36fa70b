"""What the README says besides its example, which runs in ``test_examples.py``."""

from __future__ import annotations

import re

import pytest
from places import ROOT

import usp


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
