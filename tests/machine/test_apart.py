"""Work in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import usp
from usp.machine.apart import run_apart

TASK = """
import torch
import usp
from usp.machine import apart

def where(number):
    apart.begin(torch.device("cpu"))
    return [number, usp.__file__]
"""


def test_it_imports_what_this_process_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not what lies in the folder that it runs in, as in a clone of usp's repository."""
    own, clone = tmp_path / "own", tmp_path / "clone"
    for folder in (own, clone / "usp"):
        folder.mkdir(parents=True)
    (own / "a_task.py").write_text(TASK)
    (clone / "usp" / "__init__.py").write_text("raise ImportError('sources of another usp')")
    monkeypatch.syspath_prepend(str(own))
    monkeypatch.chdir(clone)
    ended = run_apart("a_task:where", [3, 4], patience=60)
    assert ended.began, ended.reason
    assert ended.answers == [[3, usp.__file__], [4, usp.__file__]]
    assert sys.path[0] == str(own)
