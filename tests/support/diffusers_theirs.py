"""A plugin for pytest in a checkout of diffusers: its parallel tests on CPUs, by our backend.

They want two accelerators and know how to start processes for CUDA and XPU alone: here they get
CPUs and gloo, and children that are forked instead of begun anew. A rank whose output nobody reads
leaves without waiting for it, while the other still reads from it: here they leave together.
"""

from __future__ import annotations

import importlib
import os
from types import SimpleNamespace
from typing import Any

import libraries
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from usp.integrations import diffusers as door

os.environ["DIFFUSERS_TEST_DEVICE"] = "cpu"
libraries.import_torchvision()  # before their conftest
_leave = dist.destroy_process_group


def _fork(run: Any, args: tuple[Any, ...], nprocs: int, join: bool) -> None:
    mp.start_processes(run, args, nprocs, join, start_method="fork")


def _leave_together() -> None:
    dist.barrier()
    _leave()


def pytest_configure() -> None:
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # what enable_parallelism divides by
    dist.destroy_process_group = _leave_together
    door.register()
    table: Any = importlib.import_module("diffusers.models.attention_dispatch")
    table._AttentionBackendRegistry.set_active_backend(table.AttentionBackendName("usp"))
    testing: Any = importlib.import_module("tests.testing_utils")
    testing.require_torch_multi_accelerator = lambda case: case
    theirs: Any = importlib.import_module("tests.models.testing_utils.parallelism")
    placed = SimpleNamespace(set_device=lambda rank: None)
    theirs.DEVICE_CONFIG["cpu"] = {"backend": "gloo", "module": placed}
    theirs.mp = SimpleNamespace(Manager=mp.Manager, spawn=_fork)
