"""csrc/ has floors too (the second table of docs/design.md): who includes whom, and who torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import CSRC, ROOT

SOURCES = sorted(path for path in CSRC.rglob("*.*") if path.suffix in {".h", ".cpp", ".cu"})
TABLE = re.findall(r"\|\s*(\d)\s*\|\s*`csrc/(\w+)/`", (ROOT / "docs" / "design.md").read_text())
FLOORS = {folder: int(floor) for floor, folder in TABLE}
# What only csrc/torch may see, and those to whom the emulated GPU is one more device.
BINDINGS = re.compile(r"<(torch|ATen|c10)/|<Python\.h>")
DEVICES = {"gpu/gpu.h", "gpu/instructions.h"}


def label(path: Path) -> str:
    return str(path.relative_to(CSRC))


def test_the_table_is_the_tree() -> None:
    assert {label(path).split("/")[0] for path in SOURCES} == set(FLOORS)


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_includes_go_down(path: Path) -> None:
    room, text = label(path).split("/")[0], path.read_text()
    for name in re.findall(r'#include "([^"]+)"', text):
        assert (CSRC / name).is_file(), f"{name} is no path from csrc/"
        other = name.split("/")[0]
        assert other == room or FLOORS[other] < FLOORS[room], f"{label(path)} includes {name}"
        if name.startswith("gpu/emulated/"):
            assert label(path) in DEVICES or label(path).startswith("gpu/emulated/")
    assert room == "torch" or not BINDINGS.search(text), f"{label(path)} knows torch or Python"
