"""What the README and the page of options say besides examples."""

from __future__ import annotations

import inspect
import re

import pytest
from places import ROOT

import usp

OPTIONS = (ROOT / "docs" / "options.md").read_text()


@pytest.mark.parametrize("name", re.findall(r"usp\.(\w+)\(", (ROOT / "README.md").read_text()))
def test_names_in_the_readme_exist(name: str) -> None:
    assert hasattr(usp, name)


def test_layouts_picture() -> None:
    """The table of who holds which token is what the layouts say."""
    from usp.planning.layout import rows

    layouts: dict[str, str | usp.DocumentZigzag] = {
        "contiguous": "contiguous",
        "zigzag": "zigzag",
        "striped": "striped",
        "documents": usp.DocumentZigzag((0, 8, 16)),
    }
    for name, layout in layouts.items():
        (line,) = re.findall(rf"^{name} +([\d |]+)", OPTIONS, re.MULTILINE)
        held = [0] * 16
        for rank, row in enumerate(rows(layout, 16, 4)):
            for position in row.tensor.tolist():
                held[position] = rank
        assert [int(number) for number in re.findall(r"\d", line)] == held, name


def test_every_option_has_its_row() -> None:
    parameters = set(inspect.signature(usp.long_context_attention).parameters)
    for name in parameters - {"q", "k", "v", "mesh", "spread"}:
        assert re.search(rf"^\|.*`{name}\b.*\|.*\|$", OPTIONS, re.MULTILINE), name
