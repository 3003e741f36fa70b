"""The mesh: who is where, which groups, copies, composition with other axes."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pool as worker
import pytest
import torch
import torch.distributed as dist
from cases import Case, local
from judge import assert_close, attend, join, oracle
from pool import RemoteError
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

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


def pickled() -> bytes:
    return pickle.dumps(worker.mesh(2, 1))


def of_another_world(pickles: list[bytes]) -> None:
    worker.mesh(2, 2)  # whose process groups have the names that those had
    mesh = pickle.loads(pickle.dumps(copy.copy(pickle.loads(pickles[dist.get_rank() % 2]))))
    assert mesh.ulysses_degree == 2
    attend(PLAIN, local(PLAIN, 0), mesh)


def test_a_mesh_of_another_process_is_refused_and_comes_home(pool) -> None:
    """Its groups are not there, or others are by their names."""
    pickles = pool.run(pickled, ranks=2)
    for rank, error in enumerate(pool.outcomes(of_another_world, pickles, ranks=4)):
        assert isinstance(error, RemoteError) and error.kind == "RuntimeError"
        assert f"pickled as rank {rank % 2} of another process" in error.message
    there_and_back = [pickle.dumps(pickle.loads(each)) for each in pickles]
    assert pool.run(came_home, there_and_back, ranks=2) == [0, 1]


def came_home(pickles: list[bytes]) -> int:
    mesh = pickle.loads(pickles[dist.get_rank()])
    return int(mesh.gather_objects(dist.get_rank())[mesh.rank])


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
        mesh = usp.init_mesh(1, 2, group=pair)
        assert mesh.ring.size == 2


def test_groups_that_torch_cannot_name_alike(pool) -> None:
    """Torch names a group of some ranks by how many groups there are; else it waits forever."""
    outcomes = pool.outcomes(uneven_numbers_of_groups, ranks=3)
    if "group_count" in dist.distributed_c10d._hash_ranks_to_str.__code__.co_names:
        assert outcomes == [None] * 3  # that torch can be told where to go on
        return
    assert outcomes[2] is None
    for outcome in outcomes[:2]:
        assert isinstance(outcome, RemoteError) and outcome.kind == "ValueError"
        assert "process groups" in outcome.message


def the_world_after_some_ranks() -> dict[str, torch.Tensor]:
    usp.init_mesh(3, 1)  # other tests have left other numbers here, which would stop new_group
    pair = dist.new_group([0, 2])
    if dist.get_rank() in (0, 2):
        usp.init_mesh(1, 2, group=pair)
    mesh = usp.init_mesh(1, 3)
    return attend(PAIR, local(PAIR, mesh.rank), mesh)


def test_a_mesh_of_the_world_after_one_of_some_ranks(pool) -> None:
    """Torch 2.15 counts the groups of the former, and would name those of the latter apart."""
    shards = pool.run(the_world_after_some_ranks, ranks=3)
    assert_close(PAIR, join(PAIR, shards), oracle(PAIR))


def wrong_degrees(ulysses: int, ring: int) -> None:
    usp.init_mesh(ulysses, ring)


WRONG_DEGREES = [
    ((2, 2), ["4 ranks", "has 3"]),
    ((0, 3), ["ulysses_degree", "0"]),
    ((3, -1), ["ring", "-1"]),
    ((True, 3), ["ulysses_degree", "True"]),
    ((3, 1.0), ["ring_degree", "1.0"]),
    (("3", 1), ["ulysses_degree", "'3'"]),
    ((3, None), ["ring_degree", "None"]),
    ((torch.ones(2), 1), ["ulysses_degree", "tensor"]),
]


@pytest.mark.parametrize(("degrees", "numbers"), WRONG_DEGREES)
def test_degrees_that_do_not_fit(pool, degrees: tuple, numbers: list[str]) -> None:
    for outcome in pool.outcomes(wrong_degrees, *degrees, ranks=3):
        assert outcome.kind in ("ValueError", "TypeError")
        assert all(number in outcome.message for number in numbers), outcome.message


def degrees_of_numpy() -> str:
    return repr(usp.init_mesh(np.int64(1), np.int32(3)))


def test_numbers_of_numpy_are_numbers(pool) -> None:
    assert (
        pool.run(degrees_of_numpy, ranks=3) == ["SequenceMesh(ulysses_degree=1, ring_degree=3)"] * 3
    )


def degrees_that_differ(mine: list[tuple]) -> None:
    usp.init_mesh(*mine[dist.get_rank()])


@pytest.mark.parametrize(
    ("mine", "words"),
    [
        ([(1, 3), (3, 1), (1, 3)], ["(1, 3)", "(3, 1)"]),
        ([(1, 3), (1, 3), (1, 2)], ["2 ranks", "has 3"]),
        ([(1, 3.0), (1, 3), (1, 3)], ["ring_degree", "3.0"]),
    ],
    ids=str,
)
def test_every_rank_hears_of_degrees_that_differ(pool, mine: list[tuple], words: list[str]) -> None:
    for outcome in pool.outcomes(degrees_that_differ, mine, ranks=3):
        assert outcome.kind in ("ValueError", "TypeError"), outcome
        assert all(word in outcome.message for word in words), outcome.message


# name of an axis -> its size; then the names of ours, and the degrees (ulysses, ring) they make
AXES = {
    "ring alone": ({"ring": 4}, {}, (1, 4)),
    "ulysses alone": ({"ulysses": 4}, {}, (4, 1)),
    "ulysses beside others": ({"dp": 2, "ulysses": 2}, {}, (2, 1)),
    "another name": ({"cp": 4}, {"ring": "cp"}, (1, 4)),
    "another name, the other axis": ({"dp": 2, "cp": 2}, {"ulysses": "cp"}, (2, 1)),
    "None": ({"cp": 2, "ulysses": 2}, {"ring": "cp", "ulysses": None}, (1, 2)),
    "two of three": ({"a": 2, "b": 1, "c": 2}, {"ring": "c", "ulysses": "a"}, (2, 2)),
    "flattened": ({"a": 2, "b": 2}, {"ring": "a_b"}, (1, 4)),
    "flattened ulysses": ({"a": 2, "b": 2}, {"ring": None, "ulysses": "a_b"}, (4, 1)),
}
OVERLAPS = {
    "one axis twice": ({"cp": 4}, {"ring": "cp", "ulysses": "cp"}, ["'cp'", "[0, 1, 2, 3]"]),
    "one of size 1 twice": ({"dp": 4, "cp": 1}, {"ring": "cp", "ulysses": "cp"}, ["'cp'"]),
    "flattened twice": ({"a": 2, "b": 2}, {"ring": "a_b", "ulysses": "b"}, ["'a_b'", "'b'"]),
    "typing error": ({"ulysses": 2, "rings": 2}, {}, ["'ring'", "'rings'"]),
    "no such name": ({"ulysses": 4}, {"ring": "cp"}, ["'cp'", "'ulysses'"]),
    "neither": ({"dp": 4}, {}, ["'dp'", "mesh=None"]),
    "None twice": ({"ring": 4}, {"ring": None, "ulysses": None}, ["'ring'", "mesh=None"]),
    "a number": ({"ring": 4}, {"ring": 0}, ["ring", "0"]),
}


def of_axes(sizes: dict[str, int], names: dict) -> tuple[tuple[int, int], list[int], int]:
    """Degrees, and the tokens of 13 that the ranks hold together."""
    whole = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    if "a_b" in names.values():
        whole["a", "b"]._flatten("a_b")
    mesh = usp.SequenceMesh.from_device_mesh(whole, **names)
    held = mesh.gather_objects(usp.positions(13, mesh, "zigzag").tolist())
    numbers = mesh.gather_numbers(mesh.rank)
    assert numbers == [(rank,) for rank in range(mesh.size)], numbers
    return (
        (mesh.ulysses_degree, mesh.ring_degree),
        sorted(p for some in held for p in some),
        mesh.rank,
    )


@pytest.mark.parametrize("name", AXES)
def test_axes_that_are_there_and_that_are_not(pool, name: str) -> None:
    sizes, names, degrees = AXES[name]
    results = pool.run(of_axes, sizes, names, ranks=4)
    assert all(found[:2] == (degrees, list(range(13))) for found in results), results
    ranks = sorted(found[2] for found in results)
    size = degrees[0] * degrees[1]
    assert ranks == sorted(list(range(size)) * (4 // size))


@pytest.mark.parametrize("name", OVERLAPS)
def test_axes_that_give_no_rank_a_place_of_its_own(pool, name: str) -> None:
    sizes, names, words = OVERLAPS[name]
    for outcome in pool.outcomes(of_axes, sizes, names, ranks=4):
        assert isinstance(outcome, RemoteError)
        assert outcome.kind in ("ValueError", "TypeError")
        assert all(word in outcome.message for word in words), outcome.message


def a_mesh_of_some() -> str:
    some = DeviceMesh("cpu", torch.tensor([0, 2]), mesh_dim_names=("ring",))
    return repr(usp.SequenceMesh.from_device_mesh(some))


def test_a_rank_that_is_not_in_the_device_mesh(pool) -> None:
    outcomes = pool.outcomes(a_mesh_of_some, ranks=3)
    assert outcomes[0] == outcomes[2] == "SequenceMesh(ulysses_degree=1, ring_degree=2)"
    assert outcomes[1].kind == "ValueError"
    assert "rank 1" in outcomes[1].message and "[0, 2]" in outcomes[1].message


def test_what_is_no_device_mesh() -> None:
    with pytest.raises(TypeError, match="DeviceMesh"):
        usp.SequenceMesh.from_device_mesh("cpu")


def unknown_axis() -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ulysses", "rings"))
    usp.SequenceMesh.from_device_mesh(mesh)


def test_an_axis_that_does_not_exist(pool) -> None:
    for outcome in pool.outcomes(unknown_axis, ranks=2):
        assert outcome.kind == "ValueError"
        assert "rings" in outcome.message and "'ring'" in outcome.message


def test_without_a_process_group_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        usp.init_mesh(1, 1)


def in_another_order(table: list[list[int]], names: tuple[str, str]) -> tuple[int, int] | str:
    made = DeviceMesh("cpu", table, mesh_dim_names=names)
    try:
        mesh = usp.SequenceMesh.from_device_mesh(made)
    except ValueError as error:
        return str(error)
    return mesh.ring_rank, mesh.ulysses_rank


@pytest.mark.long
def test_two_ranks_never_have_one_place(pool) -> None:
    """torch's groups are in the order of global ranks, whatever that of the mesh is."""
    names = "ring", "ulysses"
    found = pool.run(in_another_order, [[0, 2], [1, 3]], names, ranks=4)
    assert found == [(0, 0), (1, 0), (0, 1), (1, 1)]
    found = pool.run(in_another_order, [[3, 2], [1, 0]], names[::-1], ranks=4)
    assert found == [(0, 0), (1, 0), (0, 1), (1, 1)]
    for said in pool.run(in_another_order, [[3, 1], [0, 2]], names, ranks=4):
        assert "the ranks [[3, 1], [0, 2]] of the device mesh, axes 'ring' x 'ulysses'" in said
