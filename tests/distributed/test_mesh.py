"""The mesh: who is where, which groups, copies, composition with other axes."""

from __future__ import annotations

import copy
import pickle

import pool as worker
import pytest
import torch
import torch.distributed as dist
from cases import Case, local
from judge import assert_close, attend, join, oracle
from pool import RemoteError
from torch.distributed.device_mesh import init_device_mesh

import usp


def places(ulysses: int, ring: int) -> tuple:
    mesh = worker.mesh(ulysses, ring)
    groups = [
        None if axis.group is None else dist.get_process_group_ranks(axis.group)
        for axis in (mesh.ring, mesh.ulysses)
    ]
    return mesh.size, mesh.rank, mesh.ring_rank, mesh.ulysses_rank, *groups


def test_ulysses_ranks_are_neighbours(pool) -> None:
    assert pool.run(places, 2, 3, ranks=6) == [
        (6, 0, 0, 0, [0, 2, 4], [0, 1]),
        (6, 1, 0, 1, [1, 3, 5], [0, 1]),
        (6, 2, 1, 0, [0, 2, 4], [2, 3]),
        (6, 3, 1, 1, [1, 3, 5], [2, 3]),
        (6, 4, 2, 0, [0, 2, 4], [4, 5]),
        (6, 5, 2, 1, [1, 3, 5], [4, 5]),
    ]


def test_an_axis_of_size_one_needs_no_group(pool) -> None:
    assert pool.run(places, 1, 2, ranks=2) == [
        (2, 0, 0, 0, [0, 1], None),
        (2, 1, 1, 0, [0, 1], None),
    ]
    assert pool.run(places, 1, 1, ranks=1) == [(1, 0, 0, 0, None, None)]


PLAIN = Case(ulysses=2, ring=2, seq_len=13, heads=3, kv_heads=3, causal=True, layout="zigzag")


def copies() -> list[dict[str, torch.Tensor]]:
    mesh = worker.mesh(2, 2)
    tensors = [local(PLAIN, dist.get_rank()) for _ in range(2)]
    twins = [copy.deepcopy(mesh), pickle.loads(pickle.dumps(mesh))]
    assert all(twin.rank == mesh.rank and repr(twin) == repr(mesh) for twin in twins)
    return [attend(PLAIN, t, twin) for t, twin in zip(tensors, twins, strict=True)]


def test_copies_and_pickles_work(pool) -> None:
    expected = oracle(PLAIN)
    for results in zip(*pool.run(copies, ranks=4), strict=True):
        assert_close(PLAIN, join(PLAIN, list(results)), expected)


def side_by_side() -> list[dict[str, torch.Tensor]]:
    """Two meshes of the same ranks in alternation: no state is shared."""
    first, second = usp.init_mesh(4, 1), usp.init_mesh(1, 4)
    cases = [Case(**{**vars(PLAIN), "ulysses": u, "ring": 4 // u}) for u in (4, 1)]
    results = []
    for _ in range(2):
        for case, mesh in zip(cases, (first, second), strict=True):
            results.append(attend(case, local(case, dist.get_rank()), mesh))
    return results


def test_two_meshes_live_side_by_side(pool) -> None:
    expected = oracle(PLAIN)
    for i, results in enumerate(zip(*pool.run(side_by_side, ranks=4), strict=True)):
        case = Case(**{**vars(PLAIN), "ulysses": (4, 1)[i % 2], "ring": (1, 4)[i % 2]})
        assert_close(case, join(case, list(results)), expected)


PAIR = Case(ring=3, seq_len=11, heads=2, kv_heads=1, causal=True)


def beside_data_parallel() -> tuple[int, dict[str, torch.Tensor]]:
    whole = init_device_mesh("cpu", (2, 3, 1), mesh_dim_names=("dp", "sp_ring", "sp_heads"))
    mesh = usp.SequenceMesh.from_device_mesh(whole, ring="sp_ring", ulysses="sp_heads")
    replica = whole.get_local_rank("dp")
    case = Case(**{**vars(PAIR), "seed": replica})
    return mesh.rank, attend(case, local(case, mesh.rank), mesh)


def test_axes_of_a_larger_device_mesh(pool) -> None:
    results = pool.run(beside_data_parallel, ranks=6)
    assert [rank for rank, _ in results] == [0, 1, 2, 0, 1, 2]
    for replica in (0, 1):
        case = Case(**{**vars(PAIR), "seed": replica})
        shards = [result for _, result in results[3 * replica : 3 * replica + 3]]
        assert_close(case, join(case, shards), oracle(case))


def on_some_ranks(members: list[int]) -> tuple[int, dict[str, torch.Tensor]] | None:
    """The others do nothing: they need not know."""
    group = dist.new_group(members)
    if dist.get_rank() not in members:
        return None
    mesh = usp.init_mesh(2, 2, group=group)
    return mesh.rank, attend(PLAIN, local(PLAIN, mesh.rank), mesh)


def test_a_mesh_on_some_ranks_of_the_world(pool) -> None:
    results = pool.run(on_some_ranks, [1, 2, 4, 5], ranks=6)
    assert [r if r is None else r[0] for r in results] == [None, 0, 1, None, 2, 3]
    shards = [result[1] for result in results if result is not None]
    assert_close(PLAIN, join(PLAIN, shards), oracle(PLAIN))


def uneven_numbers_of_groups() -> None:
    pair = dist.new_group([0, 1])
    if dist.get_rank() == 0:
        dist.new_group([0], use_local_synchronization=True)
    if dist.get_rank() < 2:
        usp.init_mesh(1, 2, group=pair)


def test_groups_that_torch_cannot_name_alike_are_refused(pool) -> None:
    """Torch names a group of some ranks by how many groups there are; else it waits forever."""
    outcomes = pool.outcomes(uneven_numbers_of_groups, ranks=3, timeout=20)
    assert outcomes[2] is None
    for outcome in outcomes[:2]:
        assert isinstance(outcome, RemoteError) and outcome.kind == "ValueError"
        assert "process groups" in outcome.message


def wrong_degrees(ulysses: int, ring: int) -> None:
    usp.init_mesh(ulysses, ring)


@pytest.mark.parametrize(
    ("degrees", "numbers"),
    [((2, 2), ["4 ranks", "has 3"]), ((0, 3), ["ulysses_degree", "0"]), ((3, -1), ["ring", "-1"])],
)
def test_degrees_that_do_not_fit(pool, degrees: tuple[int, int], numbers: list[str]) -> None:
    for outcome in pool.outcomes(wrong_degrees, *degrees, ranks=3):
        assert outcome.kind == "ValueError"
        assert all(number in outcome.message for number in numbers), outcome.message


def unknown_axis() -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ulysses", "rings"))
    usp.SequenceMesh.from_device_mesh(mesh)


def test_an_axis_that_does_not_exist(pool) -> None:
    for outcome in pool.outcomes(unknown_axis, ranks=2):
        assert outcome.kind == "ValueError"
        assert "rings" in outcome.message and "'ring'" in outcome.message


def test_without_a_process_group_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        usp.init_mesh(1, 1)
