"""A ring of two levels: what crosses between nodes, when, and on which meshes."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any
from unittest import mock

import pool as worker
import pytest
import torch
import torch.distributed as dist
from cases import DTYPES, Case, local
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import attend, judge
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import usp
from usp.attention import block
from usp.attention.masking import MaskOptions, make_masks
from usp.distributed.comm import Axis
from usp.masks import everything
from usp.planning.cost import Bytes, Place, Shape, bytes_between_nodes, bytes_sent


def events(case: Case) -> list[tuple[str, int]]:
    """What one rank does in which order: with the size of the axis, or 0 for a block."""
    log: list[tuple[str, int]] = []

    def posting(name: str, function: Any) -> Any:
        def post(axis: Axis, *args: Any) -> Any:
            log.append((name, axis.size))
            wait = function(axis, *args)

            def waited() -> Any:
                log.append(("arrived", axis.size))
                return wait()

            return waited

        return post

    def computing(name: str, function: Any) -> Any:
        def compute(*args: Any) -> None:
            log.append((name, 0))
            function(*args)

        return compute

    mesh = worker.mesh(1, case.ring, case.ring_outer)
    with (
        mock.patch.object(Axis, "shift", posting("shift", Axis.shift)),
        mock.patch.object(Axis, "exchange", posting("exchange", Axis.exchange)),
        mock.patch.object(block, "attention_forward", computing("block", block.attention_forward)),
        mock.patch.object(
            block, "attention_backward", computing("gradients", block.attention_backward)
        ),
    ):
        attend(case, local(case, dist.get_rank()), mesh)
    return log


def test_the_outer_hop_is_in_flight_while_the_inner_ring_turns(pool) -> None:
    """2 nodes of 3 ranks: blocks of the own node from both sides, then those of the other."""
    case = Case(ring=6, ring_outer=2, seq_len=12)
    turn = [("shift", 3), ("shift", 3), ("block", 0), ("arrived", 3), ("block", 0), ("arrived", 3)]
    turn += [("block", 0)]
    for log in pool.run(events, case, ranks=6):
        forward = [("shift", 2), *turn, ("arrived", 2), *turn]
        assert log[: len(forward)] == forward
        backward = log[len(forward) :]
        blocks = [i for i, what in enumerate(backward) if what == ("gradients", 0)]
        assert blocks[2] < backward.index(("arrived", 2)) < blocks[3]
        # gradients of a node come together before they go on to the next
        exchanges = [axis for what, axis in backward if what == "exchange"]
        assert exchanges == [3, 3, 3, 3, 2]


def crossing(case: Case) -> tuple[int, int]:
    """Bytes that this rank sends to other nodes, forward and backward."""
    rank, sent = dist.get_rank(), [0, 0]
    node_size, now = case.ulysses * case.ring // case.ring_outer, 0

    def count(axis: Axis, by: int, message: torch.Tensor) -> None:
        assert axis.group is not None
        to = dist.get_global_rank(axis.group, (axis.rank + by) % axis.size)
        sent[now] += message.nbytes if to // node_size != rank // node_size else 0

    shift, exchange = Axis.shift, Axis.exchange

    def counted_shift(axis: Axis, message: torch.Tensor, out: Any, by: int = 1) -> Any:
        count(axis, by, message)
        return shift(axis, message, out, by)

    def counted_exchange(axis: Axis, send: Any, receive: Any) -> Any:
        for by, message in send:
            count(axis, by, message)
        return exchange(axis, send, receive)

    class Backward:
        def __enter__(self) -> None:
            nonlocal now
            now = 1

        def __exit__(self, *_: Any) -> None:
            pass

    mesh = worker.mesh(case.ulysses, case.ring, case.ring_outer)
    with (
        mock.patch.object(Axis, "shift", counted_shift),
        mock.patch.object(Axis, "exchange", counted_exchange),
    ):
        attend(case, local(case, rank), mesh, around_backward=Backward())
    return sent[0], sent[1]


def by_formula(case: Case, rank: int) -> tuple[int, int]:
    (mask,) = (m for _, m, _ in make_masks(MaskOptions(case.causal, case.window), case.batch))
    shape = Shape(
        batch=case.batch,
        query_len=case.seq_len,
        key_len=case.num_keys,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        value_head_dim=case.value_dim,
        dtype=DTYPES[case.dtype],
        key_padding_mask=case.padding is not None,
    )
    degrees, place = (case.ring, case.ulysses), divmod(rank, case.ulysses)
    here = Place(*degrees, *place, case.layout, mask, case.transport, case.ring_outer)
    nodes = case.ring_outer
    forward, backward = (bytes_between_nodes(shape, here, nodes, way).total for way in (0, 1))
    return forward, backward


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ulysses, ring, nodes = draw(st.sampled_from([(1, 4, 2), (1, 6, 2), (1, 6, 3), (1, 4, 4)]))
    bound, kv_heads = st.one_of(st.none(), st.integers(0, 12)), draw(st.integers(1, 3))
    case = Case(
        ulysses=ulysses,
        ring=ring,
        ring_outer=nodes,
        layout=draw(st.sampled_from(["contiguous", "zigzag", "striped"])),
        transport=draw(
            st.sampled_from(["ring", "direct", "queries", "query_ring", "grid", "auto"])
        ),
        batch=draw(st.integers(1, 2)),
        seq_len=draw(st.integers(1, 31)),
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        dtype=draw(st.sampled_from(["float64", "float32", "bfloat16"])),
        causal=draw(st.booleans()),
        window=draw(st.tuples(bound, bound)),
        padding=draw(st.sampled_from([None, 0.3])),
    )
    return replace(case, transport="ring") if case.transport == "grid" and nodes == ring else case


@settings(max_examples=settings.default.max_examples // 4)
@given(case=cases())
def test_what_leaves_a_node_is_as_the_formula_says(pool, case: Case) -> None:
    assert pool.run(crossing, case, ranks=case.ranks) == [
        by_formula(case, rank) for rank in range(case.ranks)
    ]


def test_a_block_crosses_to_each_other_node_once() -> None:
    """By hand: 3 nodes of 4 ranks with n tokens each; and a plain ring over the same ranks."""
    n, key = 5, 3 * (4 + 2)
    shape = Shape(1, 12 * n, 12 * n, 3, 3, 4, 2, torch.float32)

    def sent(outer: int) -> list[Bytes]:
        places = (Place(12, 1, r, 0, transport="ring", ring_outer_degree=outer) for r in range(12))
        return [bytes_between_nodes(shape, place, 3, backward=True) for place in places]

    assert sent(3) == [Bytes(0, 2 * n * key * 4, 2 * n * key * 4)] * 12
    plain = sent(1)
    # 6 hops to the next rank and 5 to the one before, on two ranks of each node
    assert [each.blocks // (n * key * 4) for each in plain] == [5, 0, 0, 6] * 3
    assert sum(each.total for each in plain) > sum(each.total for each in sent(3))


def on_three_axes(sizes: dict[str, int], names: dict[str, str | None]) -> tuple:
    whole = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    mesh = usp.SequenceMesh.from_device_mesh(whole, **names)
    for twin in (copy.deepcopy(mesh), pickle.loads(pickle.dumps(mesh))):
        assert repr(twin) == repr(mesh) and twin.ring == mesh.ring
    levels = mesh.ring_levels and tuple(axis.size for axis in mesh.ring_levels)
    degrees = mesh.ulysses_degree, mesh.ring_degree, mesh.ring_outer_degree
    assert ("ring_outer" in repr(mesh)) == (degrees[2] > 1)
    return degrees, (mesh.ring_rank, mesh.ulysses_rank), levels


@pytest.mark.parametrize(
    ("sizes", "names", "degrees", "levels"),
    [
        ({"ring_outer": 2, "ring": 3}, {}, (1, 6, 2), (2, 3)),
        ({"ring_outer": 3, "ring": 1, "ulysses": 2}, {}, (2, 3, 3), None),
        ({"dp": 1, "node": 2, "cp": 3}, {"ring_outer": "node", "ring": "cp"}, (1, 6, 2), (2, 3)),
        ({"ring_outer": 2, "ring": 3}, {"ring_outer": None}, (1, 3, 1), None),
    ],
    ids=str,
)
def test_three_axes_of_a_device_mesh(
    pool, sizes: dict, names: dict, degrees: tuple, levels: tuple | None
) -> None:
    results = pool.run(on_three_axes, sizes, names, ranks=6)
    assert {found[0] for found in results} == {degrees}
    assert {found[2] for found in results} == {levels}
    ranks = [place for _, place, _ in results]
    if names.get("ring_outer", "") is not None:
        assert ranks == [divmod(rank, sizes.get("ulysses", 1)) for rank in range(6)]


def refused(table: list, names: tuple[str, ...], more: dict) -> None:
    if table:
        whole = DeviceMesh("cpu", torch.tensor(table), mesh_dim_names=names)
        usp.SequenceMesh.from_device_mesh(whole, **more)
    else:
        usp.init_mesh(1, 4, **more)


@pytest.mark.parametrize(
    ("table", "names", "more", "words"),
    [
        ([], (), {"ring_outer_degree": 3}, ["ring_outer_degree 3", "ring_degree 4"]),
        ([], (), {"ring_outer_degree": 0}, ["ring_outer_degree", "0"]),
        ([], (), {"ring_outer_degree": "2"}, ["ring_outer_degree", "'2'"]),
        ([[0, 1], [2, 3]], ("ring", "ring_outer"), {}, ["[0, 2, 1, 3]", "ring_outer"]),
        ([[0, 1], [2, 3]], ("ring", "b"), {"ring_outer": "c"}, ["'c'", "ring_outer="]),
        ([[0, 1], [2, 3]], ("ring", "b"), {"ring_outer": "ring"}, ["ring_outer axis", "ring axis"]),
    ],
    ids=str,
)
def test_meshes_that_make_no_double_ring_are_refused_everywhere(
    pool, table: list, names: tuple[str, ...], more: dict, words: list[str]
) -> None:
    for outcome in pool.outcomes(refused, table, names, more, ranks=4):
        assert outcome.kind in ("ValueError", "TypeError"), outcome
        assert all(word in outcome.message for word in words), outcome.message


def outer_degrees_that_differ() -> None:
    usp.init_mesh(1, 4, ring_outer_degree=1 + dist.get_rank() % 2)


def test_every_rank_hears_of_outer_degrees_that_differ(pool) -> None:
    for outcome in pool.outcomes(outer_degrees_that_differ, ranks=4):
        assert outcome.kind == "ValueError" and "ring_outer_degree = 2" in outcome.message


def test_larger_rings_with_all_options(pool) -> None:
    case = Case(ring=6, ring_outer=3, seq_len=37, heads=4, kv_heads=2, layout="zigzag", batch=2)
    options = {"causal": True, "padding": 0.2, "dropout_p": 0.2, "alibi": "h", "return_lse": True}
    judge(Case(**{**vars(case), **options}), pool)


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_a_grid_sends_with_the_root_of_its_ranks(nodes: int) -> None:
    """16 ranks, n tokens each, bf16, full attention: by hand, and least on a square."""
    n, h, d, places = 8, 2, 64, 16 // nodes
    shape = Shape(1, 16 * n, 16 * n, h, h, d, d, torch.bfloat16)

    def sent(transport: str, backward: bool) -> int:
        places = (
            Place(16, 1, r, 0, "contiguous", everything(), transport, nodes) for r in range(16)
        )
        (same,) = {bytes_sent(shape, place, backward).total for place in places}
        return same

    keys, queries = (nodes - 1) * n * h, (places - 1) * n * h
    assert sent("grid", False) == keys * 4 * d + queries * (2 * d + 4 * (d + 1))
    assert sent("grid", True) == keys * 12 * d + queries * (8 * d + 8)
    assert sent("ring", True) == 15 * n * h * 12 * d
    assert sum(sent("grid", way) for way in (False, True)) < 0.6 * sum(
        sent("ring", way) for way in (False, True)
    )


def on_a_plain_ring(which: str) -> None:
    q = torch.zeros(1, 2, 1, 4)
    mesh = worker.mesh(1, 4, 2 if which == "bias" else 1)
    bias = torch.zeros(1, 1, 2, 8) if which == "bias" else None
    usp.long_context_attention(q, q, q, mesh, attn_bias=bias, transport="grid")


@pytest.mark.parametrize(
    ("which", "words"),
    [("plain", ["ring of two levels", "ring_degree 4"]), ("bias", ["attn_bias", "'grid'"])],
)
def test_grids_that_are_none_are_refused_everywhere(pool, which: str, words: list[str]) -> None:
    for outcome in pool.outcomes(on_a_plain_ring, which, ranks=4):
        assert outcome.kind in ("ValueError", "NotImplementedError"), outcome
        assert all(word in outcome.message for word in words), outcome.message
