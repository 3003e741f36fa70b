"""Meshes made of ranks and degrees: process groups, together on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from usp.distributed import comm
from usp.distributed.degrees import checked_degrees, checked_outer
from usp.distributed.launch import choose_device, default_device_type
from usp.distributed.mesh import SequenceMesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack

    from usp.planning.choose.auto import Attention


def init_mesh(
    ulysses_degree: int | Literal["auto"],
    ring_degree: int | None = None,
    *,
    ring_outer_degree: int = 1,
    device_type: str | None = None,
    group: ProcessGroup | None = None,
    **attention: Unpack[Attention],
) -> SequenceMesh:
    """Make the mesh of the ranks that share one sequence.

    Every rank of the group calls it, with the same degrees, which they compare. Without a process
    group it starts the default one, from torchrun's variables or else from those of Slurm's
    ``srun`` (``MASTER_ADDR`` and ``MASTER_PORT`` count where they are set), and makes this rank's
    accelerator the current one: that of its local rank, or the only one it can see.

    ``init_mesh("auto", seq_len=131072, heads=32)`` takes the degrees that the planner predicts to
    be the fastest for one attention (docs/planner.md).

    Args:
        ulysses_degree: Ranks that share the heads of a row; neighbours in the group. "auto": the
            planner says, of all degrees that make up the group.
        ring_degree: Rows that pass blocks of keys around.
        ring_outer_degree: Nodes over which these rows lie, as many in each: above 1 the ring is a
            double one (arXiv:2406.18485), so that a block crosses to each other node once, while
            the ring inside a node turns. The axes of the mesh are then ``ring_outer``, ``ring``
            (inside a node) and ``ulysses``.
        device_type: "cpu" or "cuda" (also for AMD); by default the accelerator that is there,
            else the CPU.
        group: The ranks of the mesh, in their order; the whole world by default.
        **attention: Of "auto" alone: ``seq_len`` and ``heads``, and ``kv_heads``, ``head_dim``
            (128), ``causal`` (False) and ``cluster`` (what was measured, or what the device is
            called) where they are others.

    Raises:
        TypeError: a degree is no integer, or an argument of "auto" is not known, or is there
            without it.
        ValueError: "auto" lacks seq_len or heads, the degrees do not make up the group or differ
            between its ranks, this process is not in it, there is no process group to begin with,
            or no device for this rank.
    """
    started = comm.ensure_initialised()
    ranks, rank = comm.group_ranks(group), comm.global_rank()
    if rank not in ranks:
        raise ValueError(f"rank {rank} is not in the group {ranks} and cannot make its mesh")
    told, own, error = "", None, None
    try:
        kind = torch.device(device_type or default_device_type()).type
        if started is not None:
            own = choose_device(kind, started)
        degrees = checked_degrees((ulysses_degree, ring_degree), len(ranks), attention, kind)
        outer = checked_outer(ring_outer_degree, degrees[1])
        told = f"ulysses_degree x ring_degree x device_type = {degrees}, {kind}"
        told += f", ring_outer_degree = {outer}"
    except Exception as refusal:  # the others must not wait for this rank
        error = refusal
    comm.compare_before_groups(group, told, own, error)
    table = torch.tensor(ranks, device="cpu").view(outer, -1, degrees[0])
    return SequenceMesh(_device_mesh(table, group, kind))


def mesh_among(
    ranks: Sequence[int], degrees: tuple[int, int], group: ProcessGroup | None, device_type: str
) -> SequenceMesh:
    """This rank's of meshes side by side, whose ranks are neighbours; all make theirs together.

    Args:
        ranks: Global ranks of all these meshes, in order.
        degrees: Of the ring and of Ulysses in each.
        group: All of ``ranks``, which have compared already; None is the world.
        device_type: "cpu" or "cuda".
    """
    from torch.distributed.device_mesh import DeviceMesh

    table = torch.tensor(ranks, device="cpu").view(-1, *degrees)
    lines = [table.movedim(1, 2).flatten(0, 1).tolist(), table.flatten(0, 1).tolist()]
    groups = comm.axis_groups(lines, group)
    own = table[ranks.index(comm.global_rank()) // (degrees[0] * degrees[1])]
    names = "ring", "ulysses"
    return SequenceMesh(DeviceMesh.from_group(groups, device_type, mesh=own, mesh_dim_names=names))


def _device_mesh(table: torch.Tensor, group: ProcessGroup | None, device_type: str) -> DeviceMesh:
    """Over ranks (ring_outer, ring, ulysses); a plain ring has no outer axis."""
    from torch.distributed.device_mesh import DeviceMesh

    names: tuple[str, ...] = "ring_outer", "ring", "ulysses"
    if len(table) == 1:
        table, names = table[0], names[1:]
    lines = [table.movedim(dim, -1).flatten(0, -2).tolist() for dim in range(table.dim())]
    groups = comm.axis_groups(lines, group)
    return DeviceMesh.from_group(groups, device_type, mesh=table, mesh_dim_names=names)
