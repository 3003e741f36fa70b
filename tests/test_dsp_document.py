"""Everything that docs/dsp.md shows runs, in its order, on one device."""

from __future__ import annotations

import re

import torch
from places import ROOT

import usp

TEXT = (ROOT / "docs" / "dsp.md").read_text()


def test_examples_of_the_dsp_document_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    torch.manual_seed(0)
    given = {"video": torch.randn(2, 3, 5, 32), "text": torch.randn(2, 4, 12), "mesh": None}
    names = {"torch": torch, **given}
    assert len(blocks) == TEXT.count("```python") > 0
    for block in blocks:
        exec(compile(block, "docs/dsp.md", "exec"), names)
    assert names["out"].shape == given["video"].shape


def test_every_name_is_in_the_document() -> None:
    for name in usp.dsp.__all__:
        assert f"`{name}" in TEXT, name
