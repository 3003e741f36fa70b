"""Processes of this machine that measure together: how they start, meet, and take a time."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

import usp
from usp.bench.device import synchronize
from usp.bench.options import BenchError
from usp.bench.timing import Times, take_turns
from usp.distributed import comm, processes
from usp.distributed.comm import Axis
from usp.distributed.processes import ProcessFailed
from usp.machine import cpu

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

MINUTES = 30  # that a rank waits for another


@dataclass(frozen=True)
class World:
    """What all processes are given.

    Attributes:
        args: Of the program.
        size: How many processes there are.
        cores: What they share: on Linux they keep to so many.
        device: "cuda" where each has a GPU of its own, else "cpu".
        store: A path by which they find each other.
    """

    args: argparse.Namespace
    size: int
    cores: int
    device: str
    store: str

    @property
    def threads(self) -> int:
        """Of a process."""
        return max(1, self.cores // self.size)


def device_for(size: int, device: str) -> str:
    """ "cuda" if that was asked for and each of so many processes gets a GPU of its own."""
    return "cuda" if device == "cuda" and torch.cuda.device_count() >= size else "cpu"


def in_processes(
    work: Callable[..., Any],
    args: argparse.Namespace,
    size: int,
    hear: Callable[..., None] = lambda *_: None,
) -> list[Any]:
    """``work(world, rank, tell)`` on each of ``size`` fresh processes: results by rank.

    Args:
        hear: What rank 0 tells, as it comes.

    Raises:
        BenchError: a process failed; says how.
    """
    with tempfile.TemporaryDirectory(prefix="usp-bench-") as folder:
        cores = getattr(args, "cores", None) or len(cpu.cores())
        device = device_for(size, args.device or "cpu")
        world = World(args, size, cores, device, f"{folder}/store")
        try:
            return processes.run(work, world, size, hear)
        except ProcessFailed as failed:
            raise BenchError(f"{failed.details}\n{failed}") from failed


@contextmanager
def joined(world: World, rank: int) -> Iterator[None]:
    """Meets the other processes."""
    sys.stdout.flush()
    os.dup2(2, 1)  # what libraries say does not get among the records
    torch.set_num_threads(world.threads)
    if hasattr(os, "sched_setaffinity") and world.device == "cpu":
        os.sched_setaffinity(0, cpu.cores()[: world.cores])
    if world.device == "cuda":
        torch.cuda.set_device(rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl",
            store=dist.FileStore(world.store, world.size),
            rank=rank,
            world_size=world.size,
            timeout=timedelta(minutes=MINUTES),
        )
    else:
        comm.join_locally(world.store, rank, world.size, 60.0 * MINUTES)
    try:
        yield
    finally:
        dist.destroy_process_group()


def axis() -> Axis:
    """All processes."""
    return Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD)


def device_mesh(shape: Sequence[int], names: tuple[str, ...], device: str) -> DeviceMesh | None:
    """A mesh of the first ranks, which every rank asks for; None on those that are not in it."""
    from torch.distributed.device_mesh import DeviceMesh

    ranks = torch.arange(math.prod(shape)).view(*shape)
    made = DeviceMesh(device, ranks, mesh_dim_names=names)
    return None if made.get_coordinate() is None else made


def mesh(shape: tuple[int, int], device: str) -> usp.SequenceMesh:
    """(Ulysses, ring) degrees of all processes."""
    return usp.init_mesh(*shape, device_type=device)


def slowest_seconds(run: Callable[[], object]) -> float:
    """What a call took that all ranks begin together, on the slowest of them."""
    synchronize()
    dist.barrier()
    start = time.perf_counter()
    run()
    synchronize()
    taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


def as_first_rank_says(wish: bool) -> bool:
    said = torch.tensor(wish)
    dist.broadcast(said, 0)
    return bool(said)


def turns(candidates: Mapping[str, Callable[[], object]], rounds: int, seconds: float) -> Times:
    """``timing.take_turns`` of all ranks together: the slowest counts."""
    return take_turns(dict(candidates), rounds, seconds, slowest_seconds, as_first_rank_says)


def everyone(item: Any) -> list[Any]:
    """What each rank says, by rank."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, item)
    return told


def at_first(item: Any) -> list[Any]:
    """What each rank says, on rank 0; nothing on others."""
    told = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(item, told)
    return told or []


def tried_together(
    runs: Mapping[str, Callable[[], Any]],
) -> tuple[dict[str, Any], dict[str, str]]:
    """What each gives on this rank; why the others give nothing on some rank."""
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, run in runs.items():
        said = None
        try:
            found[name] = run()
            synchronize()
        except Exception as error:  # whoever cannot do this says so in many ways
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        first = next((f"rank {r}: {why}" for r, why in enumerate(everyone(said)) if why), None)
        if first is not None:
            failed[name] = first
            found.pop(name, None)
    return found, failed


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows_of_all(index: Tensor, results: list[Tensor]) -> list[Tensor]:
    """On rank 0 all rows of each result, in the order of their positions; [] on others.

    Args:
        index: (L,) positions of this rank's rows.
        results: (B, L, ...) each; moved to the host.
    """
    parts = at_first((index.cpu(), [x.cpu() for x in results]))
    if not parts:
        return []
    order = torch.cat([positions for positions, _ in parts]).argsort()
    columns = zip(*(found for _, found in parts), strict=True)
    return [torch.cat(rows, 1)[:, order] for rows in columns]
