"""The topology: a mesh (ring, ulysses) over torch's ``DeviceMesh``; a ring may have two levels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import combinations, count
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4
from weakref import WeakValueDictionary

import torch

from usp.distributed import comm
from usp.distributed.comm import Axis
from usp.distributed.degrees import checked_degrees, checked_outer
from usp.distributed.launch import choose_device, default_device_type

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack

    from usp.planning.choose.auto import Attention

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
        found = _sequence_axes(device_mesh, names)
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
        self._home: str | None = None  # the process that made it, where that is another
        if self.ring_levels is not None:
            self._ring_ranks = tuple(self._gather_along_ring(rank))
            _check_ring(self._ring_ranks)
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
    if not _PROCESS.startswith(f"{os.getpid()}-"):
        globals()["_PROCESS"] = f"{os.getpid()}-{uuid4()}"
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


def _axis_ranks(device_mesh: DeviceMesh, kind: str, name: str | None) -> list[int] | None:
    """Global ranks along the axis; None if it is not there and need not be.

    Raises:
        TypeError, ValueError: see ``SequenceMesh.from_device_mesh``.
    """
    if name is None:
        return None
    if not isinstance(name, str):
        raise TypeError(f"{kind} must be the name of an axis or None, got {name!r}")
    ranks, names = comm.axis_ranks(device_mesh, name), device_mesh.mesh_dim_names or ()
    near = get_close_matches(name, names, n=1)
    if ranks is None and (name != kind or near):
        raise ValueError(
            f"the device mesh has axes {names}, none is called {name!r}"
            f"{f' (did you mean {near[0]!r}?)' if near else ''}: pass {kind}= the name of an "
            "axis, or None for a degree of 1"
        )
    return ranks


def _sequence_axes(
    device_mesh: DeviceMesh, names: dict[str, str | None]
) -> dict[str, list[int] | None]:
    """Global ranks along each of the sequence axes, at least one of which is there."""
    if not hasattr(device_mesh, "mesh_dim_names"):
        raise TypeError(f"device_mesh must be a DeviceMesh, got {type(device_mesh).__name__}")
    if device_mesh.get_coordinate() is None:
        raise ValueError(
            f"rank {comm.global_rank()} is not in the device mesh of ranks "
            f"{device_mesh.mesh.flatten().tolist()} and has no place on it"
        )
    found = {kind: _axis_ranks(device_mesh, kind, name) for kind, name in names.items()}
    if all(ranks is None for ranks in found.values()):
        raise ValueError(
            f"the device mesh has axes {device_mesh.mesh_dim_names}, and none of them is to share "
            "the sequence: name one or two in ring= and ulysses=; one device needs no mesh "
            "(mesh=None)"
        )
    for one, other in combinations(names, 2):
        shared = set(found[one] or ()) & set(found[other] or ())
        if (names[one] == names[other] and names[one] is not None) or len(shared) > 1:
            raise ValueError(
                f"{one} axis {names[one]!r} and {other} axis {names[other]!r} of the device mesh "
                f"both hold ranks {sorted(shared)}, but a rank needs a place of its own on either: "
                "name axes that do not overlap, or None for a degree of 1"
            )
    _check_order(device_mesh, [name for name in names.values() if name is not None])
    return found


def _check_ring(ranks: tuple[int, ...]) -> None:
    """Refuse a double ring that is in no order of torch's groups, alike on all its ranks.

    Raises:
        ValueError: shows the ranks.
    """
    if list(ranks) != sorted(ranks):
        raise ValueError(
            f"the ring goes over ranks {list(ranks)} of the device mesh, node by node, and torch's "
            "process groups count up: make the DeviceMesh of ranks that count up along ring_outer, "
            "then ring"
        )


def _check_order(device_mesh: DeviceMesh, names: list[str]) -> None:
    """Refuse where two ranks would have one place: groups are in the order of global ranks, so
    that a place in them is no place in a mesh that goes up and down.

    Raises:
        ValueError: the same on all ranks of the mesh; shows its table.
    """
    axes = list(device_mesh.mesh_dim_names or ())
    names = [name for name in names if name in axes]
    if len(names) < 2:
        return
    dims = [axes.index(name) for name in names]
    own: Sequence[int] = device_mesh.get_coordinate() or ()
    index = tuple(slice(None) if dim in dims else place for dim, place in enumerate(own))
    table = device_mesh.mesh[index].permute([sorted(dims).index(dim) for dim in dims])
    for dim in range(len(dims)):
        places = table.argsort(dim).argsort(dim).movedim(dim, 0).flatten(1)
        if bool((places != places[:, :1]).any()):
            axes_said = " x ".join(map(repr, names))
            raise ValueError(
                f"the ranks {table.tolist()} of the device mesh, axes {axes_said}, are in no order "
                "that torch's process groups have, which count up: make the DeviceMesh of ranks "
                "that count up along all axes"
            )


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
