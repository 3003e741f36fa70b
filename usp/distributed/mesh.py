"""The topology: a 2-D mesh (ring, ulysses) over torch's ``DeviceMesh``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from usp.distributed import comm
from usp.distributed.comm import Axis

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class SequenceMesh:
    """The ranks that share one sequence, as ``ring_degree`` rows of ``ulysses_degree``.

    Ulysses is the inner axis: neighbours exchange heads, rows pass blocks of keys. Copies and
    pickles: it keeps the ``DeviceMesh`` and looks process groups up when they are used.

    Attributes:
        ulysses_degree, ring_degree, size: Ranks along each axis, and of both.
        rank, ring_rank, ulysses_rank: Place of this process;
            ``rank = ring_rank * ulysses_degree + ulysses_rank``.
        device_mesh: The ``DeviceMesh`` below, which may have more axes.
    """

    def __init__(self, device_mesh: DeviceMesh, ring: str = "ring", ulysses: str = "ulysses"):
        names = device_mesh.mesh_dim_names or ()
        for name in (ring, ulysses):
            if name not in names:
                raise ValueError(f"the device mesh has axes {names}, none is called {name!r}")
        self.device_mesh = device_mesh
        self._names = {"ring": ring, "ulysses": ulysses}
        self.ring_degree = device_mesh[ring].size()
        self.ulysses_degree = device_mesh[ulysses].size()
        self.ring_rank = device_mesh.get_local_rank(ring)
        self.ulysses_rank = device_mesh.get_local_rank(ulysses)

    @classmethod
    def from_device_mesh(
        cls, device_mesh: DeviceMesh, ring: str = "ring", ulysses: str = "ulysses"
    ) -> SequenceMesh:
        """The sequence axes of a larger mesh (dp, tp, pp axes are left alone).

        Args:
            device_mesh: Mesh with named axes, this process in it.
            ring, ulysses: Names of its two sequence axes.

        Raises:
            ValueError: an axis of that name does not exist; names those that do.
        """
        return cls(device_mesh, ring, ulysses)

    @property
    def size(self) -> int:
        return self.ring_degree * self.ulysses_degree

    @property
    def rank(self) -> int:
        return self.ring_rank * self.ulysses_degree + self.ulysses_rank

    @property
    def device_type(self) -> str:
        return self.device_mesh.device_type

    @property
    def ring(self) -> Axis:
        """The axis along which blocks of keys are passed."""
        return self._axis("ring", self.ring_degree, self.ring_rank)

    @property
    def ulysses(self) -> Axis:
        """The axis along which heads are scattered."""
        return self._axis("ulysses", self.ulysses_degree, self.ulysses_rank)

    def _axis(self, kind: str, size: int, rank: int) -> Axis:
        group = self.device_mesh.get_group(self._names[kind]) if size > 1 else None
        return Axis(size, rank, group)

    @comm.untraced
    def gather_objects(self, item: Any) -> list[Any]:
        """Everyone's small picklable object, in order of ``rank``."""
        rows = self.ring.gather_objects(self.ulysses.gather_objects(item))
        return [item for row in rows for item in row]

    @comm.untraced
    def gather_numbers(self, number: int) -> list[int]:
        """Everyone's 64-bit number, in order of ``rank``; less than an object costs."""
        numbers = torch.tensor([number], device=self.device_type)
        for axis in (self.ulysses, self.ring):
            whole = numbers.new_empty(axis.size * len(numbers))
            numbers = axis.all_gather(numbers, whole, [len(numbers)] * axis.size)()
        return cast("list[int]", numbers.tolist())

    @comm.untraced
    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        return self.ring.all_reduce(self.ulysses.all_reduce(tensor))

    @comm.untraced
    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor of the first rank, in place."""
        return self.ulysses.broadcast(self.ring.broadcast(tensor))

    def __repr__(self) -> str:
        return f"SequenceMesh(ulysses_degree={self.ulysses_degree}, ring_degree={self.ring_degree})"


def degrees_and_place(mesh: SequenceMesh | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """(ring, ulysses) degrees, and this process's (ring, ulysses) ranks; None is one device."""
    if mesh is None:
        return (1, 1), (0, 0)
    return (mesh.ring_degree, mesh.ulysses_degree), (mesh.ring_rank, mesh.ulysses_rank)


def init_mesh(
    ulysses_degree: int,
    ring_degree: int,
    *,
    device_type: str | None = None,
    group: ProcessGroup | None = None,
) -> SequenceMesh:
    """Make the mesh of the ranks that share one sequence.

    Every rank of the group calls it, with the same degrees. Without a process group it starts the
    default one from torchrun's environment.

    Args:
        ulysses_degree: Ranks that share the heads of a row; neighbours in the group.
        ring_degree: Rows that pass blocks of keys around.
        device_type: "cpu" or "cuda" (also for AMD); by default what torch finds.
        group: The ranks of the mesh, in their order; the whole world by default.

    Raises:
        ValueError: the degrees do not make up the group, this process is not in it, or there is
            no process group to begin with.
    """
    for name, degree in (("ulysses_degree", ulysses_degree), ("ring_degree", ring_degree)):
        if degree < 1:
            raise ValueError(f"{name} must be 1 or more, got {degree}")
    comm.ensure_initialised()
    ranks, size = comm.group_ranks(group), ulysses_degree * ring_degree
    if len(ranks) != size:
        raise ValueError(
            f"ulysses_degree {ulysses_degree} x ring_degree {ring_degree} is {size} ranks, but "
            f"the group has {len(ranks)}: change a degree, pass group=, or build a larger "
            "DeviceMesh and use SequenceMesh.from_device_mesh"
        )
    rank = comm.global_rank()
    if rank not in ranks:
        raise ValueError(f"rank {rank} is not in the group {ranks} and cannot make its mesh")
    table = torch.tensor(ranks, device="cpu").view(ring_degree, ulysses_degree)
    return SequenceMesh(_device_mesh(table, group, device_type or _default_device_type()))


def _device_mesh(table: torch.Tensor, group: ProcessGroup | None, device_type: str) -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh

    column, row = comm.mesh_groups(table.tolist(), group)
    return DeviceMesh.from_group(
        [column, row], device_type, mesh=table, mesh_dim_names=("ring", "ulysses")
    )


def _default_device_type() -> str:
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator is not None else "cpu"
