"""The table of docs/backends.md is that of the code."""

from __future__ import annotations

import re

import pytest
from library_cases import label
from places import ROOT

from usp.backends import TABLE
from usp.backends.library.record import Record
from usp.backends.library.table import ROWS

TEXT = (ROOT / "docs" / "backends.md").read_text()
GPUS = {
    "sm_80 and newer": {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120"},
    "CDNA 2 and newer": {"gfx90a", "gfx942", "gfx950"},
    "RDNA 3 and 4": {"gfx1100", "gfx1151", "gfx1201"},
    "sm_90": {"sm_90"},
    "sm_100": {"sm_100"},
    "sm_103": {"sm_103"},
}


def rows() -> list[list[str]]:
    lines = re.findall(r"^\| (`\w+` \| .*) \|$", TEXT, re.MULTILINE)
    cells = [line.split(" | ") for line in lines]
    return [row for row in cells if len(row) == 12]


def test_every_row_and_every_backend_is_there() -> None:
    assert [(r[0].strip("`"), r[1]) for r in rows()] == [(x.name, x.title) for x in ROWS]
    for backend in TABLE:
        assert f"`{backend.NAME}`" in TEXT


@pytest.mark.parametrize("record", ROWS, ids=label)
def test_a_row(record: Record) -> None:
    (cells,) = (row for row in rows() if row[1] == record.title)
    _, _, gpus, dtypes, dims, windows, softcap, dlse, packed, lse, empty, shown = cells
    assert dtypes.replace("fp", "float").replace("bf16", "bfloat16").split(", ") == [
        str(dtype).removeprefix("torch.") for dtype in record.dtypes
    ]
    assert windows == ("yes" if record.windows else "in squares")
    said = [softcap, dlse, packed]
    are = [record.softcap, record.dlse, record.packed is not None]
    assert said == ["yes" if is_so else "no" for is_so in are]
    assert shown == record.shown
    lies = {"hn": ["(H, tokens)"], "nh": ["(tokens, H)"], None: []}[record.packed]
    assert lse.split("; ") == [record.lse, *lies]
    values = [f"{x:+g}" if x else "0" for x in record.empty_lse]
    assert empty == (" or ".join(values) or "not known")
    takes = set().union(*(GPUS[name] for name in gpus.split(", ")))
    for architecture in set().union(*GPUS.values()):
        taken = any(re.fullmatch(pattern, architecture) for pattern in record.architectures)
        assert taken is (architecture in takes), architecture
    largest = int(re.match(r"8 to (\d+)", dims)[1])  # type: ignore[index]
    assert record.dims(largest, largest, "sm_90") is None is record.dims(8, 8, "sm_90")
    assert record.dims(largest + 8, largest + 8, "sm_90") and record.dims(12, 12, "sm_90")
    assert (record.dims(64, 32, "sm_90") is not None) is ("equal" in dims)
