"""Where this process stands among those of its job, as its launcher says: torchrun or Slurm;
and which device is its own.

``comm.py`` starts the process group with it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import torch

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
# Of one job and step, below the ports that systems give out by themselves.
_FIRST_PORT, _PORTS = 10000, 20000
# torch's own, where no job says which other it might collide with.
_DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Launch:
    """One process of a job.

    Attributes:
        rank, world_size: Place in the job.
        local_rank: Place on its node; None where nobody says.
        init_method: Where the first rank waits for the others, as a URL; None for what torch
            reads from the environment by itself, which may be a store that torchrun holds.
    """

    rank: int
    world_size: int
    local_rank: int | None
    init_method: str | None = None


def launched_by(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """What torchrun's variables say, or else Slurm's; None where there are neither.

    Under Slurm ``MASTER_ADDR`` and ``MASTER_PORT`` count where they are set; by default the
    first node of the step, and a port computed from the numbers of job and step.

    Raises:
        ValueError: variables are missing, are no numbers or contradict each other; names them.
    """
    if "RANK" in environment:
        return _torchrun(environment)
    if "SLURM_PROCID" in environment:
        return _slurm(environment)
    return None


def _torchrun(environment: Mapping[str, str]) -> Launch:
    missing = [name for name in _TORCHRUN if name not in environment]
    if missing:
        raise ValueError(
            f"RANK is set but {', '.join(missing)} not: run under torchrun, set all of "
            f"{', '.join(_TORCHRUN)}, or leave RANK out under srun, whose own variables then count"
        )
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    _check_rank("RANK", rank, "WORLD_SIZE", size)
    return Launch(rank, size, _optional_number(environment, "LOCAL_RANK"))


def _slurm(environment: Mapping[str, str]) -> Launch:
    sizes = {
        name: _number(environment, name)
        for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
        if name in environment
    }
    if not sizes:
        raise ValueError(
            "SLURM_PROCID is set but SLURM_NTASKS not: start the processes with srun --ntasks=N"
        )
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"Slurm's variables disagree on the number of processes: {told}")
    rank, size = _number(environment, "SLURM_PROCID"), max(sizes.values())
    if size > 1 and "SLURM_GTIDS" in environment and "SLURM_STEP_ID" not in environment:
        raise ValueError(
            f"this is the batch script itself, one process and not one of the job's {size} tasks: "
            "start the program with srun"
        )
    _check_rank("SLURM_PROCID", rank, "SLURM_NTASKS", size)
    local = _optional_number(environment, "SLURM_LOCALID")
    host = _address(environment, rank, local)
    host = f"[{host}]" if ":" in host else host
    return Launch(rank, size, local, f"tcp://{host}:{_port(environment)}")


def _address(environment: Mapping[str, str], rank: int, local_rank: int | None) -> str:
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"]
    for name in _NODE_LISTS:
        if environment.get(name):
            return first_node(environment[name])
    if environment.get("SLURM_LAUNCH_NODE_IPADDR"):
        return environment["SLURM_LAUNCH_NODE_IPADDR"]
    if rank == local_rank:
        return "127.0.0.1"  # as far as anybody says they are all here
    raise ValueError(
        f"Slurm's variables do not say where the first rank is (none of {', '.join(_NODE_LISTS)}): "
        "set MASTER_ADDR"
    )


def _port(environment: Mapping[str, str]) -> int:
    if "MASTER_PORT" in environment:
        return _number(environment, "MASTER_PORT")
    for name in ("SLURM_JOB_ID", "SLURM_JOBID"):
        if name in environment:
            step = environment.get("SLURM_STEP_ID", "0")
            # Steps of a job may run side by side on a node.
            number = _number(environment, name) + 7919 * (int(step) if step.isdecimal() else 0)
            return _FIRST_PORT + number % _PORTS
    return _DEFAULT_PORT


def first_node(nodes: str) -> str:
    """The first host of Slurm's notation: ``"a[07-09,12]b[1-2],c"`` is ``"a07b1"``."""
    host, rest = "", nodes
    while rest and rest[0] != ",":
        if rest[0] == "[":
            inside, closed, rest = rest[1:].partition("]")
            numbers = inside.split(",")[0].split("-")[0]
            if not closed or not numbers:
                raise ValueError(f"not a list of nodes as Slurm writes them: {nodes!r}")
            host += numbers
        else:
            host, rest = host + rest[0], rest[1:]
    if not host:
        raise ValueError(f"not a list of nodes as Slurm writes them: {nodes!r}")
    return host


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment[name]
    if not value.isdecimal():
        raise ValueError(f"{name} must be a number, 0 or more, got {value!r}")
    return int(value)


def _optional_number(environment: Mapping[str, str], name: str) -> int | None:
    return _number(environment, name) if name in environment else None


def _check_rank(rank_name: str, rank: int, size_name: str, size: int) -> None:
    if rank >= size:
        raise ValueError(f"{rank_name}={rank} must be below {size_name}={size}")


def default_device_type() -> str:
    """The accelerator that is there, else "cpu".

    torch by itself answers by how it was built, whether there is a device or not.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return "cpu"
    return accelerator.type


def choose_device(device_type: str, launch: Launch) -> str | None:
    """Make this rank's accelerator the current one, unless the program has begun to use one.

    Launchers show a process either every device of its node or its own alone.

    Returns:
        Which device that is in the whole job, which no other rank may say; None where unknown.

    Raises:
        ValueError: there are several, and none of them is that of this rank; names both numbers.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != device_type:
        return None
    module = getattr(torch, device_type)
    if module.is_initialized():
        return None
    count, local_rank = torch.accelerator.device_count(), launch.local_rank
    if count != 1 and local_rank is None:
        raise ValueError(
            f"{count} devices are visible and nobody says which is that of rank {launch.rank}: "
            f"set LOCAL_RANK, or call torch.{device_type}.set_device first"
        )
    index = 0 if count == 1 or local_rank is None else local_rank
    if index >= count:
        raise ValueError(
            f"local rank {index} has no device of its own, {count} are visible: start as many "
            'processes on a node as it has devices, or choose the device type "cpu"'
        )
    torch.accelerator.set_device_index(index)
    uuid = getattr(module.get_device_properties(index), "uuid", None)
    return None if uuid is None else f"{platform.node()} {uuid}"
