"""Degrees for documents: each has its place, and loads are what they say."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usp.planning.degrees import _NEAR, Degrees, Shared, choose_degrees, nested_degrees
from usp.planning.document_cost import DocumentCost

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 6)).map(lambda shape: nested_degrees(*shape))
COSTS = st.builds(DocumentCost, *(st.sampled_from([0.0, 1e-9, 1e-6, 1e-3]) for _ in range(6)))


def recounted(
    found: Degrees, lengths: list[int], sizes: list[tuple[int, int]], cost: DocumentCost
) -> list[float]:
    """Seconds of each rank, from where the documents are."""
    of_degree = {r * u: (r, u) for r, u in sizes}
    loads, groups = [0.0] * max(of_degree), set()
    for n, (degree, group) in zip(lengths, found.placed, strict=True):
        for rank in range(group * degree, (group + 1) * degree):
            loads[rank] += cost.of_document(n, *of_degree[degree]) if n else 0.0
        groups |= {(degree, group)} if n else set()
    for degree, group in groups:
        for rank in range(group * degree, (group + 1) * degree):
            loads[rank] += cost.of_group(*of_degree[degree])
    return loads


@given(SIZES, st.lists(st.integers(0, 5000), max_size=30), COSTS, st.sampled_from([0.5, 2, 99]))
def test_all_documents_have_places_and_loads_are_theirs(sizes, lengths, cost, at_once):
    degrees = [ring * ulysses for ring, ulysses in sizes]
    assert all(a % b == 0 and a > b for a, b in pairwise(degrees))
    shared = Shared(tuple(range(0, degrees[0], 2)), at_once)  # the others have cores of their own
    found = choose_degrees(lengths, sizes, cost, None, [shared])
    assert all(d in degrees and (g + 1) * d <= degrees[0] for d, g in found.placed)
    expected = recounted(found, lengths, sizes, cost)
    assert [seconds for seconds, _ in found.loads] == pytest.approx(expected)
    together = sum(expected[rank] for rank in shared.ranks) / at_once
    assert found.makespan == pytest.approx(max(*expected, together))
    at_least = sum(
        cost.of_document(n, 1) for n in lengths
    )  # whole, on ranks or cores that are even
    assert found.makespan * (degrees[0] - len(shared.ranks) + at_once) >= at_least * (1 - 1e-9)
    spread = sum(cost.of_document(n, *sizes[0]) for n in lengths if n) + cost.of_group(*sizes[0])
    at_most = spread * max(1.0, len(shared.ranks) / at_once)  # all on all ranks
    assert found.makespan <= at_most * _NEAR


@given(st.lists(st.integers(1, 400), min_size=1, max_size=20), st.integers(50, 2000))
def test_no_rank_holds_more_than_it_has_room_for(lengths, room):
    cost = DocumentCost(1e-6, 1e-8, 1e-7, 1e-4)
    try:
        found = choose_degrees(lengths, nested_degrees(4, 2), cost, room)
    except ValueError as refusal:
        assert str(room) in str(refusal)
        assert sum(-(-n // 8) for n in lengths) > room  # all over all ranks would not fit either
        return
    held = [0] * 8
    for n, (degree, group) in zip(lengths, found.placed, strict=True):
        for rank in range(group * degree, (group + 1) * degree):
            held[rank] += -(-n // degree)
    assert max(held) <= room
    assert held == [tokens for _, tokens in found.loads]


@pytest.mark.parametrize("mesh", [(4, 1), (1, 4), (2, 2)])
def test_a_long_tail_is_spread_and_the_short_stay_whole(mesh):
    cost = DocumentCost.of_layer(256, 1024, latency=1e-3)
    drawn = random.Random(1)
    lengths = [64 + int(400 * drawn.random()) for _ in range(60)] + [9000]
    found = choose_degrees(lengths, nested_degrees(*mesh), cost)
    assert found.placed[-1].degree == 4
    assert all(at.degree == 1 for at in found.placed[:-1])
    assert found.makespan < 1.1 * sum(seconds for seconds, _ in found.loads) / 4


def test_ranks_that_share_cores_leave_documents_whole():
    """Of four ranks on two cores three compute short documents while one has the long one."""
    cost = DocumentCost(token=1.0, pair=0.0, sent=0.1, hop=50.0)
    lengths, sizes = [100] * 30 + [1400], nested_degrees(4, 1)
    own = choose_degrees(lengths, sizes, cost)
    assert own.placed[-1].degree == 2 and own.makespan < 1300
    both = choose_degrees(lengths, sizes, cost, None, [Shared((0, 1, 2, 3), 2.0)])
    assert {at.degree for at in both.placed} == {1} and both.makespan == 2200
    # two nodes of one core: ranks are balanced, so the node with the long document is done last
    apart = choose_degrees(lengths, sizes, cost, None, [Shared((0, 1), 1.0), Shared((2, 3), 1.0)])
    assert apart.makespan == 2400


def test_a_token_that_travels_takes_its_gradient_home_in_fp32():
    cost = DocumentCost.of_layer(64, 256, kv_hidden=32, bandwidth=1e3)
    assert cost.sent == pytest.approx(16 * 32 / 1e3)  # K and V there twice, dK and dV back, 16 bits
    wide = DocumentCost.of_layer(64, 256, kv_hidden=32, bandwidth=1e3, bytes_per_number=4)
    assert wide.sent == pytest.approx(24 * 32 / 1e3)


def test_what_a_rank_sends_is_what_its_mesh_sends():
    """Of 12 tokens: by a ring of 2, Ulysses 3, and both (6 ranks, a third of the heads each)."""
    ring, heads = DocumentCost(0.0, 0.0, sent=1.0), DocumentCost(0.0, 0.0, exchanged=1.0)
    assert ring.of_document(12, 2) == 6 and heads.of_document(12, 2) == 0
    assert ring.of_document(12, 1, 3) == 0 and heads.of_document(12, 1, 3) == pytest.approx(8 / 3)
    assert ring.of_document(12, 2, 3) == 2 and heads.of_document(12, 2, 3) == pytest.approx(4 / 3)
    made = DocumentCost.of_layer(64, 256, kv_hidden=32, bandwidth=1e3)
    assert made.exchanged == pytest.approx(2 * 2 * 2 * (64 + 32) / 1e3)  # q, out, k, v, both passes
    calls = DocumentCost(0.0, 0.0, hop=1.0, call=5.0)
    assert [calls.of_group(*size) for size in ((1, 1), (4, 1), (1, 4), (2, 2))] == [0, 8, 6, 12]


def test_costs_that_are_none_are_refused():
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"DocumentCost.pair must be 0 or more seconds"):
            DocumentCost(1.0, wrong)
