"""Everything that docs/decoding.md shows runs, in its order, on one device."""

from __future__ import annotations

import re

import torch
from places import ROOT

import usp

TEXT = (ROOT / "docs" / "decoding.md").read_text()


def test_examples_of_the_decoding_document_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 18, 4, 8)
    names = {"usp": usp, "mesh": None, "q": q[:, :17], "k": k[:, :17], "v": v[:, :17]}
    names |= {"new_q": q[:, 17:], "new_k": k[:, 17:], "new_v": v[:, 17:]}
    found = []
    for block in blocks:
        exec(compile(block, "docs/decoding.md", "exec"), names)
        found.append(names["out"])
    whole = usp.long_context_attention(q, k, v, causal=True)
    torch.testing.assert_close(found[0], whole[:, 17:])
    assert found[1].shape == (2, 1, 4, 6)
    torch.testing.assert_close(found[2], whole[:, :17])
    assert names["several"].k.shape[0] == 3
