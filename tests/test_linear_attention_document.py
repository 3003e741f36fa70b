"""Everything that docs/linear_attention.md shows runs, in its order, on one device."""

from __future__ import annotations

import inspect
import re

import torch
from places import ROOT

import usp

TEXT = (ROOT / "docs" / "linear_attention.md").read_text()


def test_examples_of_the_document_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    torch.manual_seed(0)
    x = torch.randn(2, 5, 2, 3)
    names = {"torch": torch, "usp": usp, "mesh": None, "x": x, "decay": -torch.ones(2)}
    names |= dict.fromkeys("qkv", x) | {"weight": torch.randn(6, 4), "bias": torch.randn(6)}
    assert len(blocks) == TEXT.count("```python") > 0
    for block in blocks:
        exec(compile(block, "docs/linear_attention.md", "exec"), names)
    assert names["out"].shape == x.shape


def test_every_option_is_in_the_document() -> None:
    plain = {"q", "k", "v", "mesh", "layout", "seq_len"}
    for name in set(inspect.signature(usp.linear_attention).parameters) - plain:
        assert f"`{name}" in TEXT, name
