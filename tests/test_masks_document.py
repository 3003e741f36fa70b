"""Everything that docs/masks.md shows runs, in its order, on one device."""

from __future__ import annotations

import re

import pytest
import torch
from places import ROOT

import usp
from usp import cli

TEXT = (ROOT / "docs" / "masks.md").read_text()


def test_examples_of_the_masks_document_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 17, 4, 8)
    names = {"torch": torch, "usp": usp, "q": q, "k": k, "v": v}
    assert len(blocks) == TEXT.count("```python") > 0
    for block in blocks:
        exec(compile(block, "docs/masks.md", "exec"), names)


def test_every_mask_is_in_the_document() -> None:
    for name in usp.masks.__all__:
        assert name == "Mask" or f"`{name}(" in TEXT, name


def test_command_of_the_masks_document(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = re.findall(r"^usp (plan .*)$", TEXT, re.MULTILINE)
    command, mask, rest = line.split('"')
    assert cli.main([*command.split(), mask, *rest.split()]) == 0
    assert "which keys are seen" in capsys.readouterr().out
