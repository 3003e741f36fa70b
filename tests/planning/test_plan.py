"""Plans: what each row sees, in tiles too, what is sent, and how long planning takes."""

from __future__ import annotations

import time
from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_cases import any_mask, table_of

from usp import masks
from usp.masks import Mask
from usp.planning import here, reach
from usp.planning import table as tables_of_positions
from usp.planning.layout import DocumentZigzag, Held, Layout, Layouts, Replicated, both, rows
from usp.planning.masks.options import make_mask
from usp.planning.plan import Load, Plan, make_local_plan, make_plan
from usp.planning.reach import needed_rows
from usp.planning.route import Ring
from usp.planning.samples import Samples, masks_of
from usp.planning.visit import Visit

MILLION = 1_048_576
Problem = tuple[Mask, torch.Tensor, Layouts, int]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A mask, what it says in a table, a layout and a ring's degree."""
    random, ring = Random(draw(st.integers(0, 2**32))), draw(st.integers(1, 5))
    query_len = random.randint(0, 40)
    key_len = query_len if random.random() < 0.7 else random.randint(0, 40)
    mask, sees = any_mask(random, query_len, key_len)
    layouts: list[Layout] = ["contiguous", "zigzag", "striped"]
    if query_len == key_len:
        inner = sorted(random.randint(0, query_len) for _ in range(random.randint(0, 3)))
        layouts.append(DocumentZigzag((0, *inner, query_len)))
    layout = random.choice(layouts)
    if random.random() < 0.3:
        cuts = sorted(random.randint(0, key_len) for _ in range(ring - 1))
        held = Held(tuple(b - a for a, b in pairwise((0, *cuts, key_len))))
        return mask, table_of(sees, query_len, key_len), (layout, held), ring
    return mask, table_of(sees, query_len, key_len), layout, ring


def seen_in(visit: Visit) -> torch.Tensor:
    """(queries, keys) bool of one visit."""
    if visit.span is None:
        return torch.ones(visit.num_queries, visit.num_keys, dtype=torch.bool)
    keys = torch.arange(visit.num_keys)
    return (keys >= visit.span.first[:, None]) & (keys < visit.span.stop[:, None])


def plans(problem: Problem, transport: str = "auto") -> list[Plan]:
    mask, table, layout, ring = problem
    lengths = table.shape[0], table.shape[1]
    return [make_plan(masks_of(mask), layout, lengths, ring, r, transport) for r in range(ring)]


def visits(problem: Problem, transport: str = "auto") -> list[tuple[Plan, int, Load, Visit]]:
    return [
        (plan, step.owner, load, visit)
        for plan in plans(problem, transport)
        for step in plan.steps
        for load in step.loads
        for visit in load.visits
    ]


@pytest.mark.parametrize("transport", ["auto", "ring", "direct", "allgather"])
@given(problem=problems(), tables=st.booleans())
def test_every_visible_pair_is_visited_once(transport: str, problem: Problem, tables: bool) -> None:
    """Also where keys are searched for that tables would tell."""
    _, expected, *_ = problem
    counted = torch.zeros(expected.shape, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(here, "_POSITIONS_A_LOOK_UP", 16 if tables else 0)
        patched.setattr(tables_of_positions, "_WIDTH", 8)
        make_plan.cache_clear(), needed_rows.cache_clear()
        found = visits(problem, transport)
    for plan, owner, load, visit in found:
        keys = plan.keys[owner].tensor[load.rows.index]
        assert visit.pairs == int(seen_in(visit).sum()) > 0
        counted[plan.queries.tensor[:, None], keys] += seen_in(visit)
    assert torch.equal(counted, expected.long())


@pytest.mark.parametrize("replicated", [0, 1], ids=["queries", "keys"])
@given(problem=problems())
def test_a_side_on_every_rank_sees_every_pair_once(replicated: int, problem: Problem) -> None:
    """Also where a rank holds nothing of the other side."""
    mask, expected, layout, ring = problem
    layouts, lengths = [*both(layout)], (expected.shape[0], expected.shape[1])
    layouts[replicated] = Replicated(lengths[replicated])
    counted = torch.zeros(expected.shape, dtype=torch.int64)
    for rank in range(ring):
        what = masks_of(mask), (layouts[0], layouts[1]), lengths, (ring, 1), (rank, 0)
        plan = make_local_plan(*what)
        for visit in plan.steps[0].loads[0].visits:
            counted[plan.queries.tensor[:, None], plan.keys[0].tensor] += seen_in(visit)
    assert torch.equal(counted, expected.long())


@given(problems())
def test_spans_are_monotone(problem: Problem) -> None:
    for *_, visit in visits(problem):
        if visit.span is not None:
            first, stop = visit.span.first, visit.span.stop
            assert first.dtype == stop.dtype == torch.int32
            assert (first.diff() >= 0).all() and (stop.diff() >= 0).all()


@given(problems())
def test_tiles_cover_each_visible_pair_once(problem: Problem) -> None:
    for *_, visit in visits(problem):
        covered = torch.zeros(visit.num_queries, visit.num_keys, dtype=torch.int64)
        for tile in visit.tiles:
            i = torch.arange(tile.q1 - tile.q0)[:, None]
            j = torch.arange(tile.k1 - tile.k0)[None]
            inside = torch.ones(len(i), j.shape[1], dtype=torch.bool)
            if tile.lo is not None:
                inside &= j - i >= tile.lo
            if tile.hi is not None:
                inside &= j - i <= tile.hi
            assert inside.any(1).all(), "a row of a tile sees nothing"
            covered[tile.q0 : tile.q1, tile.k0 : tile.k1] += inside
        assert torch.equal(covered, seen_in(visit).long())


@given(problem=problems(), few=st.booleans())
def test_needed_rows_are_those_that_are_seen(problem: Problem, few: bool) -> None:
    """Just those where every query is looked at, and at least those where some are."""
    mask, table, layout, ring = problem
    query_len, key_len = table.shape
    with pytest.MonkeyPatch.context() as patched:
        if few:
            patched.setattr(reach, "_STRETCHES", 3)
        needed = needed_rows.__wrapped__(mask, both(layout), (query_len, key_len), ring)
    queries, keys = (rows(*one, ring) for one in zip(both(layout), table.shape, strict=True))
    for rank, row in enumerate(needed):
        for owner, found in enumerate(row):
            seen = table[queries[rank].tensor][:, keys[owner].tensor].any(0)
            got = torch.zeros_like(seen).index_fill_(0, found.index, True)
            assert torch.equal(got, seen) or (few and not (seen & ~got).any())


@given(problems())
def test_all_ranks_choose_the_same_way(problem: Problem) -> None:
    routes = [plan.route for plan in plans(problem)]
    assert len({type(route) for route in routes}) == 1
    if isinstance(routes[0], Ring):
        assert len({tuple(len(d.hops) for d in route.directions) for route in routes}) == 1


def test_causal_tiles_are_few() -> None:
    plan = make_plan(masks_of(masks.causal()), "zigzag", (4096, 4096), 4, 1)
    assert [len(v.tiles) for s in plan.steps for v in s.loads[0].visits] == [1, 1, 1, 1]


def test_bytes_of_a_window_are_those_of_its_halo() -> None:
    """The rows seen of others, and no more: 2,560 MB a layer with whole blocks in one direction."""
    window = masks_of(masks.window(512, 512))
    for rank in range(16):
        plan = make_plan(window, "contiguous", (161_280, 161_280), 16, rank)
        sent = sum(len(rows) for _, cargo in plan.route.sent(rank) for rows in cargo)
        assert sent == (512 if rank in (0, 15) else 1024)
        assert sum(len(step.loads[0].rows) for step in plan.steps[1:]) == sent


def test_documents_that_fit_a_rank_send_nothing() -> None:
    documents = masks_of(masks.documents(range(0, 801, 100)))
    assert make_plan(documents, "contiguous", (800, 800), 8, 3).route is None


def test_neighbours_with_equal_masks_share_calls() -> None:
    a, b = masks.causal(), masks.window(3, 3)
    parts = masks_of([a, a, b, a])
    assert [part.samples for part in parts] == [Samples(0, 2), Samples(2, 3), Samples(3, 4)]
    assert masks_of([a, a]) == masks_of(a)


@pytest.mark.parametrize("layout", ["zigzag", "documents"])
def test_zigzag_balances_causal_work(layout: str) -> None:
    bounds = (0, 100, 420, 1000)
    mask = make_mask(causal=True, cu_seqlens=bounds if layout == "documents" else None)
    shape = DocumentZigzag(bounds) if layout == "documents" else layout
    pairs = [make_plan(masks_of(mask), shape, (1000, 1000), 4, r).pairs for r in range(4)]
    assert max(pairs) < 1.02 * min(pairs)


def test_plans_lie_on_the_host_whatever_the_default_device_is() -> None:
    rows.cache_clear(), make_plan.cache_clear()
    bounds = (0, 17, 64)
    with torch.device("meta"):
        each = masks.causal() & masks.documents(bounds), masks.neighbourhood((4, 8), 3)
        made = [
            make_plan(masks_of(mask), layout, (64, 64), 2, 1)
            for mask, layout in zip(each, (DocumentZigzag(bounds), "striped"), strict=True)
        ]
    for plan in made:
        for visit in (v for s in plan.steps for v in s.loads[0].visits if v.span is not None):
            assert visit.span.first.device.type == "cpu"
        assert plan.queries.tensor.device.type == "cpu"


def test_a_million_tokens_plan_once() -> None:
    """The second call is a look-up: it returns the very same plan."""
    what = "zigzag", (MILLION, MILLION), 8, 3
    plan = make_plan(masks_of(masks.causal()), *what)
    start = time.perf_counter()
    assert make_plan(masks_of(masks.causal()), *what) is plan
    assert time.perf_counter() - start < 0.01
