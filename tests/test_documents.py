"""The documentation: every block of Python runs, every command parses, every name has its place.

`pytest -s tests/test_documents.py` prints the blocks that do not run, each with its reason.
"""

from __future__ import annotations

import inspect
import re
import shlex

import document_pages
import libraries
import pytest
import readme_figures
from document_blocks import blocks, pages, python_blocks
from document_pages import STORIES
from places import ROOT

import usp
from usp import cli
from usp.cli.command import make_parser

WITH_PYTHON = [page for page in pages() if python_blocks(page)]
# why a block may be left out
KINDS = ("GPU", "library", "excerpt", "shortened", "elsewhere")


def test_stories_have_pages() -> None:
    assert set(STORIES) <= set(WITH_PYTHON)


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs(page: str, pool) -> None:
    if page in STORIES and STORIES[page].shape:
        left_out = pool.run(document_pages.run_on_mesh, page, ranks=4)[0]
    else:
        left_out = document_pages.run_alone(page)
    for block in left_out:
        print(block)
        assert block.splitlines()[1].strip().startswith(KINDS)


@pytest.mark.library
@pytest.mark.parametrize("page", ["docs/decoding.md", "docs/doors.md", "docs/tiles.md"])
def test_python_runs_that_needs_a_library(page: str, pool) -> None:
    libraries.library("transformers")
    for left_out in pool.run(document_pages.run_on_mesh, page, True, ranks=4):
        assert not [block for block in left_out if "library:" in block]


def commands() -> list[str]:
    """Lines that begin with `usp` in blocks that are no Python, without remarks behind."""
    lines = [
        line
        for page in pages()
        for block in blocks(page)
        if block.language in ("", "bash", "sh", "console")
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    found = (re.split(r"\s{2,}[(#]|\s#|\s>", line.removeprefix("$ "))[0] for line in lines)
    return sorted({line.strip() for line in found if re.match(r"usp [a-z]", line)})


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)[1:]
    make_parser().parse_args(words)
    if words[0] == "plan" and "--show" in words:
        assert cli.main(words) == 0
        assert "which keys are seen" in capsys.readouterr().out


def test_names_have_their_place() -> None:
    """On the page of what they belong to."""
    options = inspect.signature(usp.linear_attention).parameters.keys()
    wanted = {
        "masks": [f"{name}(" for name in usp.masks.__all__ if name != "Mask"],
        "dsp": usp.dsp.__all__,
        "linear_attention": options - {"q", "k", "v", "mesh", "layout", "seq_len"},
    }
    for page, names in wanted.items():
        text = (ROOT / "docs" / f"{page}.md").read_text()
        assert [name for name in names if f"`{name}" not in text] == [], page


def test_arguments_in_docstrings_are_one_line_each() -> None:
    """What the API pages read: names, a colon, and more lines further in."""
    modules = (usp, usp.masks, usp.dsp, usp.testing, usp.rng)
    found = [(name, getattr(module, name)) for module in modules for name in module.__all__]
    for name, described in found:
        told = re.search(r"^Args:\n((?: {4}.*\n|\n)+)", f"{inspect.getdoc(described)}\n", re.M)
        for line in told[1].splitlines() if told else ():
            assert re.match(r" {5}| {4}[\w*, ]+: |$", line), f"{name}: {line}"


def test_figures_are_those_of_the_results() -> None:
    readme = ROOT / "README.md"
    assert readme_figures.up_to_date(readme.read_text()) == readme.read_text(), (
        "README.md: run scripts/readme_figures.py"
    )
