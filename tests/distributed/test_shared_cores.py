"""Ranks that share cores: found by affinities, or told."""

from __future__ import annotations

import pool as worker
import pytest
import torch
from pool import Pool, RemoteError

import usp
from usp.distributed.shared_cores import Seat, own_seat, shared_cores
from usp.machine import cpu
from usp.planning.degrees import Shared


def seats(*cores: set[int], threads: int = 1, told: int | None = None) -> list[Seat]:
    return [Seat("a", frozenset(each), threads, told) for each in cores]


def test_ranks_share_what_their_affinities_have_in_common() -> None:
    assert shared_cores(seats({0, 1}, {0, 1}, {0, 1}, {0, 1})) == (Shared((0, 1, 2, 3), 2.0),)
    assert shared_cores(seats({0}, {1}, {0}, {1})) == (Shared((0, 2), 1.0), Shared((1, 3), 1.0))
    assert shared_cores(seats({0, 1}, {2, 3}, {1, 2}, {3})) == ()  # a core each, all told
    assert shared_cores(seats({0, 1}, {0, 1}, threads=2)) == (Shared((0, 1), 1.0),)
    assert shared_cores(seats({0, 1}, {2, 3}, threads=2)) == ()
    assert shared_cores(seats({0}, {1}, threads=8)) == ()  # nobody keeps more busy than there are
    elsewhere = Seat("b", frozenset({0, 1}), 1, None)
    assert shared_cores([*seats({0, 1}, {0, 1}), elsewhere]) == ()


def test_what_is_told_counts_for_each_machine() -> None:
    elsewhere = [Seat("b", frozenset({0}), 1, 2)] * 3
    found = shared_cores([*seats({0}, {1}, {2}, told=2), *elsewhere])
    assert found == (Shared((0, 1, 2), 2.0), Shared((3, 4, 5), 2.0))


def test_a_gpu_is_one_ranks_alone() -> None:
    assert shared_cores([own_seat(None, "cuda")] * 4) == ()
    with pytest.raises(ValueError, match=r"cores = 3 is for ranks on CPUs: each on cuda"):
        shared_cores([own_seat(3, "cuda")])


def found(told: list[int | None]) -> tuple[Shared, ...]:
    mesh = worker.mesh(1, 4)
    return usp.submeshes(mesh, cores=told[mesh.rank]).shared


def test_ranks_agree_on_who_shares(pool: Pool) -> None:
    cores = len(cpu.cores())
    own = pool.run(found, [None] * 4, ranks=4)
    assert own == [(Shared((0, 1, 2, 3), cores),) if cores < 4 else ()] * 4  # of one thread each
    assert pool.run(found, [3] * 4, ranks=4) == [(Shared((0, 1, 2, 3), 3.0),)] * 4
    for told, message in (
        ([2, 2, 2, 4], r"rank 0 has 2, rank 3 has 4"),
        ([2, 2, 0, 2], r"cores must be .*1.* got 0"),
    ):
        with pytest.raises(RemoteError, match=message) as raised:
            pool.run(found, told, ranks=4)
        assert raised.value.kind == "ValueError"


def test_one_device_shares_with_nobody() -> None:
    assert usp.submeshes(None).shared == ()
    assert torch.get_num_threads() == own_seat(None, "cpu").threads
