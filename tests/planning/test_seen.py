"""What queries see of the keys that are here: shared tables, bands of one shape, parts of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from usp import masks
from usp.planning import here
from usp.planning.here import some_of
from usp.planning.layout import DocumentZigzag, Layout, rows
from usp.planning.plan import make_plan
from usp.planning.positions import Positions
from usp.planning.query_ring import make_query_ring
from usp.planning.rows import Rows, joined_runs
from usp.planning.samples import masks_of

RING = 4
TABLES = DocumentZigzag((0, 20, 61, 96))
REPEATED = DocumentZigzag(tuple(range(0, 97, 8)))  # every four documents


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=6),
    st.data(),
    st.integers(1, 3),
)
def test_some_rows_are_at_their_positions(runs, data, stride) -> None:
    place, ends = 0, []
    for gap, count in runs:
        ends.append((place + gap, place + gap + stride * count))
        place = ends[-1][1]
    whole = Positions(*torch.tensor(ends).T, stride)
    taken = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=len(whole), max_size=len(whole))),
        dtype=torch.bool,
    )
    index = taken.nonzero().flatten()
    some = some_of(whole, Rows(len(whole), *joined_runs(index, index + 1)))
    assert torch.equal(some.tensor, whole.tensor[index])
    written = some.written(torch.empty(len(some), dtype=torch.int32))
    assert written.dtype == torch.int32 and torch.equal(written.long(), some.tensor)


@pytest.mark.parametrize("layout", ["striped", "zigzag", TABLES, REPEATED], ids=str)
@pytest.mark.parametrize("edges", ["clip", "shift"])
@pytest.mark.parametrize("grid", [(12, 8), (4, 3, 8), (3, 32)], ids=str)
@pytest.mark.parametrize("kernel", [4, 7])
def test_neighbourhoods_are_those_of_their_definition(
    layout: Layout, edges: str, grid: tuple[int, ...], kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, where lines are moved at edges, and grids end with the sequence."""
    monkeypatch.setattr(here, "_POSITIONS_A_LOOK_UP", 1000)
    mask = masks.neighbourhood(grid, kernel, edges=edges)
    expected, table = mask.dense(96, 96), rows(layout, 96, RING)
    what = masks_of(mask), (layout, layout), (96, 96), RING
    forward, backward = (torch.zeros(96, 96, dtype=torch.int64) for _ in range(2))
    for rank in range(RING):
        plan, grids = make_plan(*what, rank), make_query_ring(*what, rank, "auto")
        for steps, counted in (((plan,), forward), (grids.plans, backward)):
            for each in steps:
                for step in each.steps:
                    _count(each.queries.tensor, table[step.owner].tensor, step.loads[0], counted)
    assert torch.equal(forward, expected.long())
    assert torch.equal(backward, expected.long())


def _count(queries: torch.Tensor, keys: torch.Tensor, load, counted: torch.Tensor) -> None:
    """One more for each pair that is visited."""
    keys = keys[load.rows.index]
    queries = queries if load.queries is None else queries[load.queries.index]
    place = torch.arange(len(keys))
    for visit in load.visits:
        open_ = torch.ones(len(queries), len(keys), dtype=torch.bool)
        if visit.span is not None:
            first, stop = visit.span.first[:, None], visit.span.stop[:, None]
            assert (first.diff(dim=0) >= 0).all() and (stop.diff(dim=0) >= 0).all()
            open_ = (place >= first) & (place < stop)
        counted[queries[:, None], keys] += open_


def test_bands_repeat_where_keys_and_queries_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 32 positions, for all owners; lines of another width do not."""
    monkeypatch.setattr(here, "_POSITIONS_A_LOOK_UP", 1000)
    found, repeat = [], here.Here.repeat
    monkeypatch.setattr(
        here.Here, "repeat", lambda *given: found.append(repeat(*given)) or found[-1]
    )
    for width, expected in ((8, (8, 8, 8)), (12, None)):
        found.clear()
        mask = masks.neighbourhood((96 // width, width), 5, edges="shift")
        make_plan(masks_of(mask), (REPEATED, REPEATED), (96, 96), RING, 1, "direct")
        assert [repeats and repeats[:3] for repeats in found] == [expected] * RING


def test_owners_of_stripes_share_the_tables_of_their_ends() -> None:
    """Eight owners of 25 bands each would be 16 tables."""
    mask = masks.neighbourhood((64, 64), 13, edges="shift")
    what = masks_of(mask), ("striped", "striped"), (4096, 4096), 8, 3
    for plans in ((make_plan(*what, "direct"),), make_query_ring(*what, "direct").plans):
        spans = [step.loads[0].seen.span for plan in plans for step in plan.steps]
        tables = {end.data_ptr() for span in spans for end in (span.first, span.stop)}
        assert len(spans) == 8 and all(len(span.first) == 25 for span in spans)
        assert len(tables) <= 6
