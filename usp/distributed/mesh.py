"""The topology: a mesh (ring, ulysses) over torch's ``DeviceMesh``; a ring may have two levels."""

from __future__ import annotations

import os
from itertools import count
from typing import TYPE_CHECKING, Any
from uuid import uuid4
from weakref import WeakValueDictionary

import torch

from usp.distributed import comm
from usp.distributed.comm import Axis
from usp.distributed.mesh_axes import check_ring, sequence_axes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_NUMBERS = count()
_PROCESS = ""
# A graph holds text and numbers: a mesh is found by its name, as long as somebody holds it.
_BY_NAME: WeakValueDictionary[str, SequenceMesh] = WeakValueDictionary()


class SequenceMesh:
    """The ranks that share one sequence, as ``ring_degree`` rows of ``ulysses_degree``.

    Ulysses is the inner axis: neighbours exchange heads, rows pass blocks of keys; where the ring
    is a double one, among ``ring_outer_degree`` nodes of as many rows each. Copies and pickles: it
    keeps the ``DeviceMesh`` and looks process groups up when they are used.

    Attributes:
        ulysses_degree, ring_degree, size: Ranks along each axis, and of both.
        ring_outer_degree: Nodes of a double ring, which divide the ring; 1 for a plain one.
        rank, ring_rank, ulysses_rank: Place of this process;
            ``rank = ring_rank * ulysses_degree + ulysses_rank``.
        device_mesh: The ``DeviceMesh`` below, which may have more axes.
        name: Of this very mesh in this process, and its shape: what a graph made for one place
            does is not found again for another.
        inside: The mesh that ``submeshes`` made it in; None of another.
        compared: The kinds of calls in graphs of which the first is over; for us alone.
    """

    def __init__(
        self,
        device_mesh: DeviceMesh,
        ring: str | None = "ring",
        ulysses: str | None = "ulysses",
        ring_outer: str | None = "ring_outer",
    ):
        names = {"ring_outer": ring_outer, "ring": ring, "ulysses": ulysses}
        found = sequence_axes(device_mesh, names)
        self.device_mesh = device_mesh
        self._names = {kind: names[kind] for kind, ranks in found.items() if ranks is not None}
        rank = comm.global_rank()
        axes = {kind: ranks or [rank] for kind, ranks in found.items()}
        outer, inner = axes["ring_outer"], axes["ring"]
        self.ring_outer_degree, self.ulysses_degree = len(outer), len(axes["ulysses"])
        self.ring_degree = len(outer) * len(inner)
        self.ring_rank = outer.index(rank) * len(inner) + inner.index(rank)
        self.ulysses_rank = axes["ulysses"].index(rank)
        self._ring_ranks: tuple[int, ...] = ()
        self.inside: SequenceMesh | None = None
        self._home: str | None = None  # the process that made it, where that is another
        if self.ring_levels is not None:
            self._ring_ranks = tuple(self._gather_along_ring(rank))
            check_ring(self._ring_ranks)
            _ = self.ring  # makes its group, which all must do together
        self._take_name()

    def _take_name(self) -> None:
        ring = f"{self.ring_rank} of {self.ring_degree} over {self.ring_outer_degree}"
        ulysses = f"{self.ulysses_rank} of {self.ulysses_degree}"
        self.name = f"mesh {next(_NUMBERS)}: ring {ring}, ulysses {ulysses}"
        _BY_NAME[self.name] = self
        self.compared: set[str] = set()
        self._ranks: tuple[int, ...] | None = None  # of the world; told at the first ``whole``

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_home": self._home or _this_process()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._home = None if self._home == _this_process() else self._home
        self._take_name()

    @classmethod
    def from_device_mesh(
        cls,
        device_mesh: DeviceMesh,
        ring: str | None = "ring",
        ulysses: str | None = "ulysses",
        ring_outer: str | None = "ring_outer",
    ) -> SequenceMesh:
        """The sequence axes of a larger mesh (dp, tp, pp axes are left alone).

        An axis that is not there has degree 1: it may be None, or missing where it has the default
        name. With ``ring_outer`` beside ``ring`` the ring is a double one over both, and all its
        ranks call this together: they make a process group.

        Args:
            device_mesh: Mesh with named axes, this process in it. Axes that were flattened into
                one have its name too.
            ring, ulysses: Names of its two sequence axes.
            ring_outer: Name of the axis among nodes, with ``ring`` inside each.

        Raises:
            TypeError: no ``DeviceMesh``, or names that are no strings.
            ValueError: an axis of that name does not exist, two are the same or overlap, or
                this process is not in the mesh; names the axes that exist.
        """
        return cls(device_mesh, ring, ulysses, ring_outer)

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
    def is_simulated(self) -> bool:
        """Whether its ranks are but names (torch's backend "fake"), and none of them answers."""
        return any(axis.is_simulated for axis in (self.ulysses, self.ring))

    @property
    def ring(self) -> Axis:
        """The axis along which blocks of keys are passed: all ranks of the ring."""
        if self.ring_levels is None:
            kind = "ring" if self.ring_outer_degree == 1 else "ring_outer"
            return self._axis(kind, self.ring_degree, self.ring_rank)
        group, _ = comm.group_among(self._ring_ranks, self._gather_along_ring)
        return Axis(self.ring_degree, self.ring_rank, group)

    @property
    def ring_levels(self) -> tuple[Axis, Axis] | None:
        """Of a double ring, the axis among nodes and the one inside; else None."""
        if 1 in (self.ring_outer_degree, self._inner_degree):
            return None
        node, place = divmod(self.ring_rank, self._inner_degree)
        outer = self._axis("ring_outer", self.ring_outer_degree, node)
        return outer, self._axis("ring", self._inner_degree, place)

    @property
    def _inner_degree(self) -> int:
        return self.ring_degree // self.ring_outer_degree

    def _gather_along_ring(self, item: Any) -> list[Any]:
        """Everyone's small object along both levels, in order of ``ring_rank``."""
        assert self.ring_levels is not None
        outer, inner = self.ring_levels
        nodes = outer.gather_objects(inner.gather_objects(item))
        return [item for node in nodes for item in node]

    @property
    def ulysses(self) -> Axis:
        """The axis along which heads are scattered."""
        return self._axis("ulysses", self.ulysses_degree, self.ulysses_rank)

    def _axis(self, kind: str, size: int, rank: int) -> Axis:
        if size > 1 and self._home is not None:
            raise RuntimeError(
                f"{self!r} was pickled as rank {self.rank} of another process, and is none of the "
                "process groups here: make one by usp.init_mesh, and for a model of "
                "usp.parallelize, usp.restore(model) and parallelize it on that"
            )
        group = self.device_mesh.get_group(self._names[kind]) if size > 1 else None
        return Axis(size, rank, group)

    @comm.untraced
    def whole(self) -> tuple[Axis, tuple[int, ...]]:
        """All ranks as one axis, and which ``rank`` of the mesh stands at each place of it.

        Collective at the first call on a mesh of two axes: the ranks tell each other who they are,
        and make a process group where they are not the whole world.
        """
        if self.ring_degree == 1 or self.ulysses_degree == 1:
            return self.ulysses if self.ring_degree == 1 else self.ring, tuple(range(self.size))
        if self._ranks is None:
            self._ranks = tuple(self.gather_objects(comm.global_rank()))
        group, order = comm.group_among(self._ranks, self.gather_objects)
        places = tuple(self._ranks.index(rank) for rank in order)
        return Axis(self.size, places.index(self.rank), group), places

    @comm.untraced
    def gather_objects(self, item: Any) -> list[Any]:
        """Everyone's small picklable object, in order of ``rank``."""
        rows = self.ring.gather_objects(self.ulysses.gather_objects(item))
        return [item for row in rows for item in row]

    @comm.untraced
    def gather_numbers(self, *numbers: int) -> list[tuple[int, ...]]:
        """Everyone's 64-bit numbers, in order of ``rank``; less than an object costs.

        Where the ranks can talk on the host, no device is waited for.
        """
        axes = self.ulysses, self.ring
        device = "cpu" if all(axis.talks_on_host for axis in axes) else self.device_type
        flat = torch.tensor(numbers, dtype=torch.int64, device=device)
        for axis in axes:
            whole = flat.new_empty(axis.size * len(flat))
            flat = axis.all_gather(flat, whole, [len(flat)] * axis.size)()
        return [tuple(row) for row in flat.view(self.size, len(numbers)).tolist()]

    def __repr__(self) -> str:
        outer = self.ring_outer_degree
        double = f", ring_outer_degree={outer}" if outer > 1 else ""
        degrees = f"ulysses_degree={self.ulysses_degree}, ring_degree={self.ring_degree}"
        return f"SequenceMesh({degrees}{double})"


def _this_process() -> str:
    """A word that no other process has, forked ones included."""
    global _PROCESS
    if not _PROCESS.startswith(f"{os.getpid()}-"):
        _PROCESS = f"{os.getpid()}-{uuid4()}"
    return _PROCESS


def check_mesh(mesh: SequenceMesh | None) -> SequenceMesh | None:
    """``mesh`` itself if it is one.

    Raises:
        TypeError: it is something else; says how to make one.
    """
    if mesh is None or isinstance(mesh, SequenceMesh):
        return mesh
    raise TypeError(
        f"mesh must be a SequenceMesh (usp.init_mesh, usp.SequenceMesh.from_device_mesh) or None, "
        f"got {type(mesh).__name__}"
    )


def mesh_of(name: str) -> SequenceMesh:
    """The mesh of that name.

    Raises:
        RuntimeError: nobody holds it any more.
    """
    found = _BY_NAME.get(name)
    if found is None:
        raise RuntimeError(f"{name} is gone: hold the mesh as long as what was compiled for it")
    return found


def degrees_and_place(mesh: SequenceMesh | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """(ring, ulysses) degrees, and this process's (ring, ulysses) ranks; None is one device."""
    if mesh is None:
        return (1, 1), (0, 0)
    check_mesh(mesh)
    return (mesh.ring_degree, mesh.ulysses_degree), (mesh.ring_rank, mesh.ulysses_rank)
