"""Backwards where queries travel: when they do, what they send, and with whose kernels."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pool as worker
import pytest
import torch
import torch.distributed as dist
from cases import Case, local
from hypothesis import given
from hypothesis import strategies as st
from judge import attend, judge

import usp
from usp import masks
from usp.ops.delta import row_products, with_products
from usp.planning.cost import Place, Shape, bytes_sent, what_moves
from usp.planning.layout import rows
from usp.planning.masks.mask import Mask
from usp.planning.query_ring import make_query_ring
from usp.planning.reach import needed_queries
from usp.planning.route import Ring
from usp.planning.samples import masks_of
from usp.planning.sides import Moves, Sizes
from usp.testing import WireBytes


def shape_of(heads: int, kv_heads: int, seq_len: int = 4096, dim: int = 64) -> Shape:
    lengths = seq_len, seq_len
    return Shape(1, *lengths, heads, kv_heads, dim, dim, torch.bfloat16)


def by_hand(heads: int, kv_heads: int, ranks: int, n: int, dim: int) -> tuple[int, int]:
    """Bytes of a rank's backward, queries travelling or keys: per hop and token
    ``8 H d + 8 H`` against ``12 G d`` in 16 bits."""
    hops = (ranks - 1) * n
    return hops * (8 * heads * dim + 8 * heads), hops * 12 * kv_heads * dim


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (7, 7), (8, 4), (4, 1)])
def test_auto_takes_what_sends_less(heads: int, kv_heads: int) -> None:
    """Full attention: queries below H / G = 1.5, less what lse and delta weigh."""
    shape, sent = shape_of(heads, kv_heads), {}
    for transport in ("query_ring", "ring", "auto"):
        places = [Place(4, 1, r, 0, transport=transport) for r in range(4)]
        each = {bytes_sent(shape, place, backward=True).total for place in places}
        (sent[transport],) = each
    assert (sent["query_ring"], sent["ring"]) == by_hand(heads, kv_heads, 4, 1024, 64)
    assert sent["auto"] == min(sent.values())
    moves = what_moves(shape, Place(4, 1, 0, 0))
    assert moves == Moves("keys", "queries" if sent["query_ring"] < sent["ring"] else "keys")


MASKS = {
    "full": masks.everything(),
    "causal": masks.causal(),
    "window": masks.window(100, 100),
    "documents": masks.documents((0, 1000, 1700, 4096)),
    "sinks": masks.causal() & (masks.window(50, 0) | masks.first_keys(4)),
}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
def test_under_any_mask_auto_sends_no_more_than_any(mask: Mask, layout: str) -> None:
    """On one level and on two, where queries and keys may both move."""
    for (ranks, nodes), kv_heads in product([(4, 1), (4, 2), (6, 3)], [4, 1]):
        of_ring = mask, layout, ranks, nodes, kv_heads
        keys, grid = ["query_ring", "ring"], ["grid"] if nodes > 1 else []
        for backward, others in ((False, ["ring", "direct", "queries"]), (True, keys)):
            least = min(sent_by_all(name, backward, *of_ring) for name in others + grid)
            assert sent_by_all("auto", backward, *of_ring) <= least


def sent_by_all(
    transport: str, backward: bool, mask: Mask, layout: str, ranks: int, nodes: int, kv_heads: int
) -> int:
    places = [Place(ranks, 1, r, 0, layout, mask, transport, nodes) for r in range(ranks)]
    return sum(bytes_sent(shape_of(4, kv_heads), place, backward).total for place in places)


def test_auto_takes_a_grid_where_it_sends_less() -> None:
    """Full attention, n tokens a rank, bf16: by the formulas of docs/rings.md."""
    for (nodes, inner), (heads, kv_heads) in product([(2, 2), (4, 2), (2, 4)], [(4, 4), (8, 1)]):
        degree, n, d = nodes * inner, 4096 // (nodes * inner), 64
        keys = 4 * kv_heads * d
        forward = (nodes - 1) * keys + (inner - 1) * heads * (6 * d + 4), (degree - 1) * keys
        back = (nodes - 1) * 3 * keys + (inner - 1) * heads * (8 * d + 8)
        backward = back, (degree - 1) * min(3 * keys, heads * (8 * d + 8))
        shape = shape_of(heads, kv_heads)
        place = Place(degree, 1, 0, 0, ring_outer_degree=nodes)
        moves = what_moves(shape, place)
        for sent, move, is_back in zip((forward, backward), moves, (False, True), strict=True):
            assert bytes_sent(shape, place, is_back).total == n * min(sent)
            assert (move == "both") == (sent[0] < sent[1])


@given(
    mask=st.sampled_from([*MASKS.values(), ~masks.window(3, 3)]),
    layout=st.sampled_from(["contiguous", "zigzag", "striped"]),
    length=st.integers(1, 70),
    ring=st.integers(2, 5),
)
def test_queries_that_see_keys_are_needed_and_no_others(
    mask: Mask, layout: str, length: int, ring: int
) -> None:
    if isinstance(mask, type(MASKS["documents"])):
        mask = masks.documents((0, length // 3, length))
    found = needed_queries(mask, (layout, layout), (length, length), ring)
    table = mask.dense(length, length)
    placed = [row.tensor for row in rows(layout, length, ring)]
    for keys, queries in product(range(ring), range(ring)):
        sees = table[placed[queries]][:, placed[keys]].any(1)
        assert found[keys][queries].index.tolist() == sees.nonzero().flatten().tolist()


def test_products_need_no_output() -> None:
    """What a library's kernel makes of the rebuilt output is delta, also at the ends of a range."""
    torch.manual_seed(0)
    dout = torch.randn(2, 7, 3, 5, dtype=torch.float64)
    dout[0, 1] *= 1e-30
    dout[0, 2] *= 1e30
    out = torch.randn(dout.shape, dtype=torch.float64)
    delta = row_products(dout, out, torch.float64)
    found = with_products(dout.float(), delta.float())
    again = row_products(dout.float(), found, torch.float32)
    torch.testing.assert_close(again, delta.float(), rtol=1e-5, atol=0)
    assert (found.norm(dim=-1) <= out.norm(dim=-1) * 1.001).all()
    assert not with_products(torch.zeros(1, 2, 1, 4), torch.ones(1, 1, 2)).any()
    assert with_products(dout[..., :0], delta).shape == (2, 7, 3, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_backward_favours_queries_more_than_a_forward(dtype: torch.dtype) -> None:
    for dims in product((1, 2, 7, 64, 512), repeat=2):
        sizes = Sizes(1, 3, 2 * sum(dims), *dims, dtype)
        forward, backward = (
            sizes.of_queries(way).both / sizes.of_keys(way).both for way in (False, True)
        )
        assert backward < forward


def sent_back(case: Case) -> int:
    wire = WireBytes()
    mesh = worker.mesh(case.ulysses, case.ring, case.ring_outer)
    attend(case, local(case, dist.get_rank()), mesh, around_backward=wire)
    return wire.sent


def test_a_vit_sends_a_third_less_back(pool) -> None:
    """Equal heads, nothing hidden; 16 tokens a rank, 3 heads of 8 in bf16, 48 bytes to meet."""
    case = Case(ring=4, seq_len=64, heads=3, kv_heads=3, head_dim=8, value_dim=8, dtype="bfloat16")
    queries, keys = by_hand(3, 3, 4, 16, 8)
    for transport, expected in {"auto": queries, "query_ring": queries, "ring": keys}.items():
        sent = pool.run(sent_back, replace(case, transport=transport), ranks=4)
        assert {each - expected for each in sent} == {3 * 48}, transport


@pytest.mark.parametrize("backend", ["reference", "sdpa", "native"])
def test_with_everybodys_kernels(pool, backend: str) -> None:
    if usp.backends()[backend] != "can run here":
        pytest.skip(f"{backend}: {usp.backends()[backend]}")
    case = Case(ulysses=2, ring=3, seq_len=41, heads=4, kv_heads=4, causal=True, backend=backend)
    judge(replace(case, transport="query_ring", layout="zigzag", dtype="bfloat16"), pool)
    if backend != "sdpa":
        more: dict[str, Any] = {"return_lse": True, "dropout_p": 0.2, "alibi": "h", "padding": 0.2}
        judge(replace(case, transport="query_ring", ring_outer=3, window=(9, 3), **more), pool)


def test_queries_of_one_rank_may_come_from_both_sides(pool) -> None:
    """Of the rank across the ring, some rows from each."""
    place = ("zigzag",) * 2, (45, 45), 4, 0, "ring"
    grid = make_query_ring(masks_of(masks.window(9, 9)), *place)
    assert isinstance(grid.query_route, Ring)
    owners = [arrival.owner for arrival in grid.query_route.arrivals]
    assert len(owners) == len({*owners}) + 1 == len(grid.plans) - 1
    case = Case(ring=4, seq_len=45, heads=2, kv_heads=2, window=(9, 9), layout="zigzag")
    judge(replace(case, transport="query_ring"), pool)


def with_a_bias() -> None:
    q = torch.zeros(1, 2, 1, 4)
    bias = torch.zeros(1, 1, 2, 4)
    usp.long_context_attention(q, q, q, worker.mesh(1, 2), attn_bias=bias, transport="query_ring")


def test_a_bias_stays_with_its_queries(pool) -> None:
    for outcome in pool.outcomes(with_a_bias, ranks=2):
        assert outcome.kind == "NotImplementedError"
        assert "query_ring" in outcome.message and "auto" in outcome.message
