"""The ring executor: order of blocks, gradients that come home, overlap, early end."""

from __future__ import annotations

from unittest import mock

import pool as worker
import pytest
import torch
import torch.distributed as dist
from cases import Case, local
from judge import attend
from torch import Tensor

from usp.attention import block
from usp.distributed.comm import Axis
from usp.distributed.parcel import Parcel
from usp.distributed.transport import TRANSPORTS, make_transport

TRANSPORT = pytest.mark.parametrize("transport", sorted(TRANSPORTS))


def contents(owner: int, length: int) -> list[Tensor]:
    """The two tensors of an owner's block."""
    return [
        torch.full((1, length, 2), float(owner)),
        torch.full((length,), owner + 100, dtype=torch.int64),
    ]


def travel(transport: str, lengths: list[int], hops: int) -> list[list[Tensor]]:
    axis = worker.mesh(1, len(lengths)).ring
    parcels = [Parcel.of(contents(owner, n)) for owner, n in enumerate(lengths)]
    blocks = make_transport(transport, axis, hops, parcels).blocks(
        contents(axis.rank, lengths[axis.rank])
    )
    return [[tensor.clone() for tensor in block] for block in blocks]


@TRANSPORT
@pytest.mark.parametrize(
    ("lengths", "hops"),
    [([3, 3], 1), ([4, 0, 2], 2), ([1, 2, 3, 4, 5], 4), ([5, 4, 3], 1), ([3, 4], 0)],
)
def test_blocks_arrive_in_the_order_of_the_plan(
    pool, transport: str, lengths: list[int], hops: int
) -> None:
    results = pool.run(travel, transport, lengths, hops, ranks=len(lengths))
    for rank, blocks in enumerate(results):
        assert len(blocks) == hops + 1
        for step, got in enumerate(blocks):
            owner = (rank - step) % len(lengths)
            for a, b in zip(got, contents(owner, lengths[owner]), strict=True):
                assert torch.equal(a, b)


def carry(transport: str, lengths: list[int], hops: int) -> list[Tensor]:
    """Each rank adds 2^(rank) to every block it uses."""
    axis = worker.mesh(1, len(lengths)).ring
    parcels = [Parcel.of([torch.zeros(n, 3, dtype=torch.float64)]) for n in lengths]
    sums = make_transport(transport, axis, hops, parcels).sums(parcels, torch.device("cpu"))
    for step in range(hops + 1):
        (gradient,) = sums.fresh((axis.rank - step) % axis.size)
        if not hops:
            gradient.zero_()  # the only block's is to be overwritten
        gradient += 2.0**axis.rank
        sums.pass_on()
    return [tensor.clone() for tensor in sums.home()]


@TRANSPORT
@pytest.mark.parametrize(
    ("lengths", "hops"),
    [([3, 3], 1), ([4, 0, 2], 2), ([1, 2, 3, 4, 5], 4), ([5, 4, 3], 1), ([2] * 4, 2), ([3, 4], 0)],
)
def test_gradients_come_home_once_from_each_user(
    pool, transport: str, lengths: list[int], hops: int
) -> None:
    size = len(lengths)
    for rank, (home,) in enumerate(pool.run(carry, transport, lengths, hops, ranks=size)):
        users = {(rank + step) % size for step in range(hops + 1)}
        expected = torch.full((lengths[rank], 3), sum(2.0**user for user in users))
        assert torch.equal(home, expected.double())


def events(case: Case) -> list[str]:
    """What one rank does in which order, in its forward and backward."""
    log: list[str] = []

    def noted(name: str, function):
        def wrapper(*args, **kwargs):
            log.append(name)
            result = function(*args, **kwargs)
            if name == "shift":
                return noted("arrived", result)
            return result

        return wrapper

    mesh = worker.mesh(1, case.ring)
    with (
        mock.patch.object(Axis, "shift", noted("shift", Axis.shift)),
        mock.patch.object(block, "attention_forward", noted("forward", block.attention_forward)),
        mock.patch.object(block, "attention_backward", noted("backward", block.attention_backward)),
    ):
        attend(case, local(case, dist.get_rank()), mesh)
    return log


def test_the_next_block_is_in_flight_while_this_one_computes(pool) -> None:
    case = Case(ring=3, seq_len=12)
    for log in pool.run(events, case, ranks=3):
        # one message a hop: K and V together
        assert log[:7] == [*["shift", "forward", "arrived"] * 2, "forward"]
        assert log[7] == "shift", "and so again in the backward"
        first = log.index("backward")
        assert "arrived" not in log[7:first]
        assert log.count("forward") == log.count("backward") == 3
        # backward: blocks go 2 hops again, gradients 2 hops and home
        assert log.count("shift") == 2 + 2 + 3


def used_hops(case: Case) -> int:
    return events(case).count("shift")


@pytest.mark.parametrize(
    ("options", "hops"),
    [
        ({"window": (3, 0)}, 1),
        ({"window": (0, 0)}, 0),
        ({"causal": True}, 3),
        ({"cu_seqlens": (0, 4, 8, 12, 16)}, 0),
        ({}, 3),
    ],
    ids=str,
)
def test_blocks_that_nobody_needs_are_not_passed(pool, options: dict, hops: int) -> None:
    """The same number of hops on all ranks, and gradients one more, home."""
    case = Case(ring=4, seq_len=16, **options)
    expected = hops + (hops + hops + 1 if hops else 0)
    assert pool.run(used_hops, case, ranks=4) == [expected] * 4
