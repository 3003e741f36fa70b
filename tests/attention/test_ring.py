"""The ring executor: order of blocks, gradients that come home, overlap, early end."""

from __future__ import annotations

from random import Random
from typing import Any
from unittest import mock

import pool as worker
import pytest
import torch
import torch.distributed as dist
from cases import Case, local
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import attend
from torch import Tensor

from usp.attention import block
from usp.distributed.comm import Axis
from usp.distributed.double_ring import DoubleRingTransport
from usp.distributed.transport import make_transport
from usp.planning.double_ring import make_double_ring
from usp.planning.route import make_route
from usp.planning.rows import Rows, all_rows, rows_between

KEYS_MOVE = ["auto", "ring", "direct", "allgather"]
TRANSPORT = pytest.mark.parametrize("transport", KEYS_MOVE)
Runs = list[list[int]]


def contents(owner: int, length: int) -> list[Tensor]:
    """The two tensors of an owner's block; each row tells whose and which it is."""
    rows = torch.arange(length)
    return [(100.0 * owner + rows)[None, :, None].expand(1, length, 2), 100 * owner + rows[None]]


def drawn_needs(lengths: list[int], parts: int, seed: int) -> list[list[Runs]]:
    """Of each part, of each rank, of each owner, which rows it needs: all, none or some."""
    random, share = Random(seed), Random(seed).choice([0.0, 0.3, 1.0])

    def rows(length: int) -> list[int]:
        kind = random.random()
        if kind < share:
            return list(range(length))
        return [] if kind < 0.6 else [i for i in range(length) if random.random() < 0.5]

    return [[[rows(length) for length in lengths] for _ in lengths] for _ in range(parts)]


def route_of(
    transport: str, lengths: list[int], needs: list[list[Runs]], rank: int, outer: int = 1
):
    """The route for such needs, and what comes: owner and rows of each step."""

    def rows_of(length: int, held: list[int]) -> Rows:
        start = torch.tensor(held, dtype=torch.int64)
        return rows_between(length, start, start + 1)

    table = [
        [[rows_of(*of) for of in zip(lengths, row, strict=True)] for row in part] for part in needs
    ]
    if outer > 1:
        return make_double_ring(transport, table, lengths, outer, rank)
    held = [tuple(all_rows(length) for _ in needs) for length in lengths]
    return make_route(transport, table, held, rank)


def travel(transport: str, lengths: list[int], needs: list[list[Runs]], outer: int) -> list[Any]:
    """What comes to this rank, and what became of its gradients: each user adds 2 ** rank."""
    mesh = worker.mesh(1, len(lengths), outer)
    axis = mesh.ring
    route = route_of(transport, lengths, needs, axis.rank, outer)

    def made():
        if outer > 1 and route is not None:
            return DoubleRingTransport(*mesh.ring_levels, route)
        return make_transport(axis, route)

    own = [contents(axis.rank, lengths[axis.rank]) for _ in needs]
    blocks = [[[x.clone() for x in part] for part in block] for block in made().blocks(own)]
    gradients = [[torch.zeros(1, lengths[axis.rank], 3)] for _ in needs]
    sums = made().sums(gradients)
    arrivals = () if route is None else route.arrivals
    for arrival in arrivals:
        fresh = sums.fresh()
        for part, (total,) in enumerate(fresh):
            wanted = needs[part][axis.rank][arrival.owner]
            here = arrival.cargo[part].index.tolist()
            total[:, [here.index(row) for row in wanted if row in here]] += 2.0**axis.rank
        sums.pass_on()
    sums.home(gradients)
    owners = [(a.owner, [rows.index.tolist() for rows in a.cargo]) for a in arrivals]
    return [owners, blocks, [g.clone() for (g,) in gradients]]


@TRANSPORT
@settings(max_examples=max(10, settings.default.max_examples // 2))
@given(
    lengths=st.lists(st.integers(0, 5), min_size=2, max_size=6),
    parts=st.integers(1, 2),
    seed=st.integers(0, 2**16),
    nodes=st.sampled_from([1, 2, 3]),
)
def test_rows_come_to_whoever_needs_them_and_gradients_go_home(
    pool, transport: str, lengths: list[int], parts: int, seed: int, nodes: int
) -> None:
    needs = drawn_needs(lengths, parts, seed)
    outer = nodes if len(lengths) % nodes == 0 and len(lengths) > nodes else 1
    results = pool.run(travel, transport, lengths, needs, outer, ranks=len(lengths))
    for rank, (owners, blocks, _) in enumerate(results):
        assert len(blocks) == len(owners) + 1
        for part in range(parts):
            for owner, wanted in enumerate(needs[part][rank]):
                # from one side or the other
                came = [row for other, cargo in owners if other == owner for row in cargo[part]]
                assert len(came) == len(set(came)), "a row came twice"
                assert owner == rank or set(wanted) <= set(came)
        for (owner, cargo), arrived in zip(owners, blocks[1:], strict=True):
            for rows, tensors in zip(cargo, arrived, strict=True):
                for got, whole in zip(tensors, contents(owner, lengths[owner]), strict=True):
                    assert torch.equal(got, whole[:, rows])
    for owner, (_, _, gradients) in enumerate(results):
        for part, got in enumerate(gradients):
            expected = torch.zeros(lengths[owner])
            for rank, row in enumerate(needs[part]):
                if rank != owner:
                    expected[row[owner]] += 2.0**rank
            assert torch.equal(got, expected[None, :, None].expand_as(got))


@given(
    lengths=st.lists(st.integers(0, 5), min_size=2, max_size=6),
    parts=st.integers(1, 2),
    seed=st.integers(0, 2**16),
)
def test_auto_sends_least(lengths: list[int], parts: int, seed: int) -> None:
    needs = drawn_needs(lengths, parts, seed)
    ranks = range(len(lengths))

    def sent(transport: str) -> int:
        routes = [route_of(transport, lengths, needs, rank) for rank in ranks]
        return sum(
            len(rows)
            for rank, route in enumerate(routes)
            if route is not None
            for _, cargo in route.sent(rank)
            for rows in cargo
        )

    each = {transport: sent(transport) for transport in KEYS_MOVE}
    needed = sum(
        len(row[owner])
        for part in needs
        for rank, row in enumerate(part)
        for owner in ranks
        if owner != rank
    )
    assert each["auto"] == each["direct"] == needed == min(each.values())
    kinds = {type(route_of("auto", lengths, needs, rank)) for rank in ranks}
    assert len(kinds) == 1, "ranks chose differently"


def events(case: Case) -> list[str]:
    """What one rank does in which order, in its forward and backward."""
    log: list[str] = []

    def noted(name: str, function):
        def wrapper(*args, **kwargs):
            log.append(name)
            result = function(*args, **kwargs)
            if name in ("shift", "exchange"):
                return noted("arrived", result)
            return result

        return wrapper

    mesh = worker.mesh(1, case.ring)
    with (
        mock.patch.object(Axis, "shift", noted("shift", Axis.shift)),
        mock.patch.object(Axis, "exchange", noted("exchange", Axis.exchange)),
        mock.patch.object(block, "attention_forward", noted("forward", block.attention_forward)),
        mock.patch.object(block, "attention_backward", noted("backward", block.attention_backward)),
    ):
        attend(case, local(case, dist.get_rank()), mesh)
    return log


def test_the_next_block_is_in_flight_while_this_one_computes(pool) -> None:
    """From both sides: two blocks from one, one from the other."""
    case = Case(ring=4, seq_len=12)
    for log in pool.run(events, case, ranks=4):
        # one message a hop: K and V together
        forward = ["shift", "shift", "forward", "arrived", "shift", "forward"]
        forward += ["arrived", "forward", "arrived", "forward"]
        assert log[: len(forward)] == forward
        assert log[len(forward)] == "shift", "and so again in the backward"
        backward = log[len(forward) :]
        assert backward.index("backward") < backward.index("arrived")
        # a block's gradients are sent on before the next block is waited for
        order = [what for what in backward if what in ("backward", "exchange")]
        assert order == ["backward", *["backward", "exchange"] * 3]
        assert log.count("forward") == log.count("backward") == 4
        assert log.count("shift") == 3 + 3 and log.count("exchange") == 3


def used_hops(case: Case) -> tuple[int, int]:
    log = events(case)
    return log.count("shift"), log.count("exchange")


@pytest.mark.parametrize(
    ("options", "hops"),
    [
        ({"window": (3, 0)}, 1),
        ({"window": (3, 3)}, 2),
        ({"window": (0, 0)}, 0),
        ({"causal": True}, 3),
        ({"cu_seqlens": (0, 4, 8, 12, 16)}, 0),
        ({}, 3),
    ],
    ids=str,
)
def test_blocks_that_nobody_needs_are_not_passed(pool, options: dict, hops: int) -> None:
    """The same number of hops on all ranks, there and again in the backward."""
    case = Case(ring=4, seq_len=16, **options)
    assert pool.run(used_hops, case, ranks=4) == [(2 * hops, hops)] * 4


def test_one_exchange_is_in_flight_while_the_own_block_computes(pool) -> None:
    case = Case(ring=4, seq_len=16, window=(5, 5), transport="direct")
    for log in pool.run(events, case, ranks=4):
        assert log[:3] == ["exchange", "forward", "arrived"]
        assert log.count("exchange") == 3, "keys there, keys again, gradients back"
