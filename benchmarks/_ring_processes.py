"""Processes of ring benchmarks: how they start, meet, and take a time together."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from _ring_case import CORES, MESHES, PROCESSES

import usp
from usp.distributed.processes import ProcessFailed, run


@dataclass(frozen=True)
class Work:
    """What all processes are given."""

    args: argparse.Namespace
    store: str


def in_processes(function: Callable[..., Any], args: argparse.Namespace) -> list[Any]:
    """``function(work, rank, tell)`` on each of PROCESSES fresh processes: results by rank."""
    with tempfile.TemporaryDirectory(prefix="usp-bench-") as folder:
        try:
            return run(function, Work(args, f"{folder}/store"), PROCESSES, lambda done, total: None)
        except ProcessFailed as failed:
            sys.exit(f"{failed.details}\n{failed}")


def join(work: Work, rank: int) -> dict[str, usp.SequenceMesh]:
    """Meets the other processes; the meshes asked for, by name."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(work.store, PROCESSES),
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(minutes=30),
    )
    return {name: usp.init_mesh(*MESHES[name], device_type="cpu") for name in work.args.meshes}


def slowest_seconds(run: Callable[[], object]) -> float:
    """What a call took that all ranks begin together, on the slowest of them."""
    dist.barrier()
    start = time.perf_counter()
    run()
    taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


def as_first_rank_says(wish: bool) -> bool:
    said = torch.tensor(wish)
    dist.broadcast(said, 0)
    return bool(said)
