"""Who starts the ranks: torchrun's and Slurm's variables, and the device of each rank."""

from __future__ import annotations

import multiprocessing
import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool

import usp
from usp.distributed import comm, launch
from usp.distributed.launch import Launch, choose_device, first_node, launched_by

SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("frontier[00123-00125,00200]", "frontier00123"),
        ("frontier[00123],frontier00200", "frontier00123"),
        ("a[07-09,12]b[1-2],c", "a07b1"),
        ("nid-4,nid-[5-6]", "nid-4"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize("nodes", ["", ",a", "a[", "a[]", "a[3-4"])
def test_what_is_no_list_of_nodes(nodes: str) -> None:
    with pytest.raises(ValueError, match="list of nodes"):
        first_node(nodes)


@pytest.mark.parametrize(
    ("more", "url"),
    [
        ({"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}, "tcp://10.0.0.7:1234"),
        ({"MASTER_ADDR": "fe80::1", "MASTER_PORT": "1234"}, "tcp://[fe80::1]:1234"),
        ({"SLURM_NODELIST": "n[1-2]", "SLURM_JOB_ID": "20123"}, "tcp://n1:10123"),
        ({"SLURM_STEP_NODELIST": "n2", "SLURM_NODELIST": "n[1-2]"}, "tcp://n2:29500"),
        # two steps of a job side by side
        (
            {"SLURM_NODELIST": "n1", "SLURM_JOB_ID": "20123", "SLURM_STEP_ID": "1"},
            "tcp://n1:18042",
        ),
        ({"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9"}, "tcp://10.0.0.9:29500"),
        ({"SLURM_LOCALID": "3"}, "tcp://127.0.0.1:29500"),
    ],
)
def test_where_the_ranks_of_a_slurm_job_meet(more: dict[str, str], url: str) -> None:
    found = launched_by(SLURM | more)
    assert found is not None
    assert (found.rank, found.world_size, found.init_method) == (3, 8, url)
    assert found.local_rank == int((SLURM | more)["SLURM_LOCALID"])


def test_torchrun_counts_before_slurm() -> None:
    told = {"RANK": "5", "WORLD_SIZE": "6", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert launched_by(SLURM | told) == Launch(5, 6, None)
    assert launched_by(SLURM | told | {"LOCAL_RANK": "2"}) == Launch(5, 6, 2)
    assert launched_by({}) is None


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0"}, ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, ["MASTER_PORT"]),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            ["RANK=2", "WORLD_SIZE=2"],
        ),
        ({"SLURM_PROCID": "0"}, ["SLURM_NTASKS", "srun"]),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, ["4", "8"]),
        (SLURM | {"SLURM_PROCID": "8"}, ["SLURM_PROCID=8", "SLURM_NTASKS=8"]),
        (SLURM | {"SLURM_PROCID": "one"}, ["SLURM_PROCID", "'one'"]),
        (SLURM | {"SLURM_NTASKS": "-1"}, ["SLURM_NTASKS", "'-1'"]),
        (SLURM, ["MASTER_ADDR"]),  # rank 3 is the second of its node: there is another node
        (SLURM | {"SLURM_GTIDS": "0"}, ["batch script", "srun", "8"]),
    ],
)
def test_what_a_launcher_leaves_open_is_refused(
    environment: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        launched_by(environment)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def _rank_of_a_step(rank: int, environment: dict[str, str], answers: Any) -> None:
    for name in [n for n in os.environ if n.startswith(("SLURM", "MASTER"))] + ["RANK"]:
        os.environ.pop(name, None)
    os.environ.update(environment, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
    torch.set_num_threads(1)
    mesh = usp.init_mesh(1, 2)
    answers.put((mesh.rank, mesh.device_type, mesh.gather_numbers(10 + rank, rank)))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="has an accelerator")
def test_two_ranks_of_a_slurm_step_find_each_other() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"SLURM_NTASKS": "2", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    context = multiprocessing.get_context("forkserver")
    answers = context.Queue()
    processes = [
        context.Process(target=_rank_of_a_step, args=(rank, environment, answers), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    assert sorted(answers.get(timeout=250) for _ in processes) == [
        (0, "cpu", [(10, 0), (11, 1)]),
        (1, "cpu", [(10, 0), (11, 1)]),
    ]
    for process in processes:
        process.join(10)


def visible(monkeypatch: pytest.MonkeyPatch, count: int, started: bool = False) -> list[int]:
    """As on a machine with that many devices; which ones are chosen."""
    chosen: list[int] = []
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    device = SimpleNamespace(uuid="d1c3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    return chosen


@pytest.mark.parametrize(
    ("count", "local_rank", "device"),
    [(1, 0, 0), (1, 7, 0), (1, None, 0), (8, 0, 0), (8, 5, 5)],
)
def test_the_device_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, count: int, local_rank: int | None, device: int
) -> None:
    """srun --gpus-per-task=1 shows each rank its own alone, torchrun all of the node."""
    chosen = visible(monkeypatch, count)
    own = choose_device("cuda", Launch(7, 8, local_rank))
    assert chosen == [device]
    assert own is not None and "d1c3" in own


def one_device_for_all(shared: bool) -> None:
    own = "node d1c3" if shared or dist.get_rank() == 0 else "node 7aaf"
    comm.compare_before_groups(None, "the same", own, None)


def test_ranks_that_would_share_a_device(pool: Pool) -> None:
    """As where two ranks see one device each, and it is the same."""
    pool.run(one_device_for_all, False, ranks=2)
    for outcome in pool.outcomes(one_device_for_all, True, ranks=2):
        assert outcome.kind == "ValueError" and "ranks 0 and 1" in outcome.message
        assert "d1c3" in outcome.message and "cpu" in outcome.message


@pytest.mark.parametrize(
    ("local_rank", "words"), [(2, ["2", "2 are visible"]), (None, ["LOCAL_RANK"])]
)
def test_a_rank_without_a_device(
    monkeypatch: pytest.MonkeyPatch, local_rank: int | None, words: list[str]
) -> None:
    visible(monkeypatch, 2)
    with pytest.raises(ValueError) as caught:
        choose_device("cuda", Launch(2, 4, local_rank))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_device_that_the_program_chose_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = visible(monkeypatch, 8, started=True)
    choose_device("cuda", Launch(3, 8, 3))
    choose_device("cpu", Launch(3, 8, 3))
    assert chosen == []


def test_a_build_for_devices_that_are_not_there_computes_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch says how it was built; PyPI's build for Linux is one for CUDA."""
    visible(monkeypatch, 0)
    assert launch.default_device_type() == "cpu"
    visible(monkeypatch, 1)
    assert launch.default_device_type() == "cuda"
