"""The blocks of code of the documentation, and how those in Python are run, in the order of a page.

A page says in ``document_pages.py`` what its blocks are given, and what they must come to.
"""

from __future__ import annotations

import dataclasses
import linecache
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from places import ROOT

import usp

Names = dict[str, Any]
# A block of the page runs at each yield; where a string is yielded it does not, for that reason.
Story = Callable[[Names], Iterator[str | None]]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    language: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text.splitlines()[0]}"


def pages() -> list[str]:
    """All pages of the repository's documentation, from its root."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "examples" / "README.md"]
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [
        Block(page, found[1], text.count("\n", 0, found.start()) + 2, found[2])
        for found in _FENCE.finditer(text)
    ]


def python_blocks(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def run(page: str, story: Story | None, **given: Any) -> list[str]:
    """Runs the Python of a page in one namespace; returns what was left out, and why."""
    torch.manual_seed(0)
    names: Names = {"__name__": "page", "torch": torch, "usp": usp, **given}
    told = iter(story(names)) if story is not None else iter(())
    left_out = []
    for block in python_blocks(page):
        reason = next(told, None)
        if reason is None:
            _execute(block, names)
        else:
            left_out.append(f"{block}\n    {reason}")
    for _ in told:
        raise ValueError(f"{page} has fewer blocks than its story in document_pages.py")
    return left_out


def _execute(block: Block, names: Names) -> None:
    # errors point into the page
    file = str(ROOT / block.page)
    linecache.checkcache(str(Path(file)))
    exec(compile("\n" * (block.line - 1) + block.text, file, "exec"), names)


@dataclasses.dataclass(frozen=True)
class Told:
    story: Story
    shape: tuple[int, int] | None  # of the mesh: degrees of Ulysses and of the ring


STORIES: dict[str, Told] = {}


def page(name: str, shape: tuple[int, int] | None = None) -> Callable[[Story], Story]:
    def told(story: Story) -> Story:
        STORIES[name] = Told(story, shape)
        return story

    return told


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
