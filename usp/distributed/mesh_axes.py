"""The axes of a ``DeviceMesh`` that share a sequence, looked up and refused."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from itertools import combinations
from typing import TYPE_CHECKING

from usp.distributed import comm

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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


def sequence_axes(
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


def check_ring(ranks: tuple[int, ...]) -> None:
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
