"""Plans: what each row sees, in tiles too, how far blocks travel, and how long planning takes."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from usp.planning.layout import DocumentZigzag, Layout, rows
from usp.planning.mask import Mask, make_mask
from usp.planning.plan import Plan, Step, make_plan

MILLION = 1_048_576


@st.composite
def problems(draw: st.DrawFn) -> tuple[Mask, Layout, int, int, int]:
    ring, query_len, key_len = (draw(st.integers(*b)) for b in ((1, 5), (0, 40), (0, 40)))
    bound = st.none() | st.integers(0, 12)
    causal, cu_seqlens, layout = draw(st.booleans()), None, "contiguous"
    if draw(st.booleans()):
        key_len = query_len
        inner = sorted(draw(st.lists(st.integers(0, query_len), max_size=3)))
        cu_seqlens = (0, *inner, query_len)
    names: list[Layout] = ["contiguous", "zigzag", "striped"]
    layout = draw(st.sampled_from([*names, DocumentZigzag(cu_seqlens)] if cu_seqlens else names))
    mask = make_mask(
        causal=causal,
        window_size=(draw(bound), draw(bound)),
        cu_seqlens=cu_seqlens,
        prefix_len=draw(st.none() | st.integers(0, 9)) if causal else None,
    )
    return mask, layout, query_len, key_len, ring


def visible(mask: Mask, query_len: int, key_len: int) -> torch.Tensor:
    """(query_len, key_len) bool, the mask on whole sequences."""
    first, stop = mask.intervals(torch.arange(query_len), key_len)
    keys = torch.arange(key_len)
    return (keys >= first[:, None]) & (keys < stop[:, None])


def seen_by(step: Step) -> torch.Tensor:
    """(queries, keys) bool of one step."""
    if not step.pairs:
        return torch.zeros(step.num_queries, step.num_keys, dtype=torch.bool)
    if step.span is None:
        return torch.ones(step.num_queries, step.num_keys, dtype=torch.bool)
    keys = torch.arange(step.num_keys)
    return (keys >= step.span.first[:, None]) & (keys < step.span.stop[:, None])


def plans(problem: tuple[Mask, Layout, int, int, int]) -> list[Plan]:
    *what, ring = problem
    return [make_plan(*what, ring, r) for r in range(ring)]


@given(problems())
def test_steps_see_what_the_mask_says(problem: tuple[Mask, Layout, int, int, int]) -> None:
    mask, layout, query_len, key_len, ring = problem
    expected = visible(mask, query_len, key_len)
    keys = [row.tensor for row in rows(layout, key_len, ring)]
    for r, plan in enumerate(plans(problem)):
        mine = expected[rows(layout, query_len, ring)[r].tensor]
        left = mine.clone()
        for t, step in enumerate(plan.steps):
            assert step.owner == (r - t) % ring
            assert torch.equal(seen_by(step), mine[:, keys[step.owner]])
            assert step.pairs == int(seen_by(step).sum())
            left[:, keys[step.owner]] = False
        assert not left.any(), "a block that is needed was not planned"


@given(problems())
def test_all_ranks_plan_the_same_number_of_hops(
    problem: tuple[Mask, Layout, int, int, int],
) -> None:
    assert len({plan.hops for plan in plans(problem)}) == 1


@given(problems())
def test_spans_are_monotone(problem: tuple[Mask, Layout, int, int, int]) -> None:
    for plan in plans(problem):
        for step in plan.steps:
            if step.span is not None:
                first, stop = step.span.first, step.span.stop
                assert first.dtype == stop.dtype == torch.int32
                assert (first.diff() >= 0).all() and (stop.diff() >= 0).all()


@given(problems())
def test_tiles_cover_each_visible_pair_once(problem: tuple[Mask, Layout, int, int, int]) -> None:
    for plan in plans(problem):
        for step in plan.steps:
            covered = torch.zeros(step.num_queries, step.num_keys, dtype=torch.int64)
            for tile in step.tiles:
                i = torch.arange(tile.q1 - tile.q0)[:, None]
                j = torch.arange(tile.k1 - tile.k0)[None]
                inside = torch.ones(len(i), j.shape[1], dtype=torch.bool)
                if tile.lo is not None:
                    inside &= j - i >= tile.lo
                if tile.hi is not None:
                    inside &= j - i <= tile.hi
                assert inside.any(1).all(), "a row of a tile sees nothing"
                covered[tile.q0 : tile.q1, tile.k0 : tile.k1] += inside
            assert torch.equal(covered, seen_by(step).long())


def test_causal_tiles_are_few() -> None:
    plan = make_plan(make_mask(causal=True), "zigzag", 4096, 4096, 4, 1)
    assert [len(step.tiles) for step in plan.steps] == [1, 1, 1, 1]


def test_a_window_shortens_the_ring_and_documents_that_fit_need_none() -> None:
    window = make_mask(causal=True, window_size=(10, 0))
    assert make_plan(window, "contiguous", 800, 800, 8, 3).hops == 1
    assert make_plan(window, "zigzag", 800, 800, 8, 3).hops > 1
    documents = make_mask(cu_seqlens=range(0, 801, 100))
    assert make_plan(documents, "contiguous", 800, 800, 8, 3).hops == 0


@pytest.mark.parametrize("layout", ["zigzag", "documents"])
def test_zigzag_balances_causal_work(layout: str) -> None:
    bounds = (0, 100, 420, 1000)
    mask = make_mask(causal=True, cu_seqlens=bounds if layout == "documents" else None)
    shape = DocumentZigzag(bounds) if layout == "documents" else layout
    pairs = [make_plan(mask, shape, 1000, 1000, 4, r).pairs for r in range(4)]
    assert max(pairs) < 1.02 * min(pairs)


def test_the_steps_of_a_plan() -> None:
    plan = make_plan(make_mask(causal=True), "contiguous", 8, 8, 2, 0)
    assert plan.pairs == 10
    steps = [(s.owner, s.num_queries, s.num_keys, s.kind, s.pairs) for s in plan.steps]
    assert steps == [(0, 4, 4, "span", 10), (1, 4, 4, "none", 0)]


def test_plans_lie_on_the_host_whatever_the_default_device_is() -> None:
    rows.cache_clear(), make_plan.cache_clear()
    bounds = (0, 17, 64)
    with torch.device("meta"):
        mask = make_mask(causal=True, cu_seqlens=bounds)
        plan = make_plan(mask, DocumentZigzag(bounds), 64, 64, 2, 1)
        striped = make_plan(mask, "striped", 64, 64, 2, 1)
    for made in (plan, striped):
        assert made.steps[0].span is not None and made.steps[0].span.first.device.type == "cpu"
        assert made.queries.tensor.device.type == "cpu"


def test_a_million_tokens_plan_once() -> None:
    """The second call is a look-up: it returns the very same plan."""
    mask = make_mask(causal=True)
    plan = make_plan(mask, "zigzag", MILLION, MILLION, 8, 3)
    start = time.perf_counter()
    assert make_plan(make_mask(causal=True), "zigzag", MILLION, MILLION, 8, 3) is plan
    assert time.perf_counter() - start < 0.01
