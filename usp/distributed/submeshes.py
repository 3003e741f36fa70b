"""Meshes of fewer ranks inside a mesh: for sequences that do not need all of it."""

from __future__ import annotations

from collections.abc import Iterable

from usp.distributed import comm
from usp.distributed.making import mesh_among
from usp.distributed.mesh import SequenceMesh, check_mesh
from usp.distributed.shared_cores import own_seat, shared_cores
from usp.planning.degrees import Shared, nested_degrees


class Submeshes(tuple["SequenceMesh | None", ...]):
    """Of falling size; the first is the whole mesh, the last None, one device. For a schedule.

    Attributes:
        shared: Ranks of the whole that have no cores of their own, and how many compute at once.
    """

    shared: tuple[Shared, ...]

    def __new__(
        cls, meshes: Iterable[SequenceMesh | None], shared: tuple[Shared, ...] = ()
    ) -> Submeshes:
        made = super().__new__(cls, meshes)
        made.shared = shared
        return made


def submeshes(mesh: SequenceMesh | None, *, cores: int | None = None) -> Submeshes:
    """The mesh, and for each smaller degree the one that this rank is in, down to one device.

    Each divides the one before: the ring is halved (divided by its smallest prime) until one row
    is left, then Ulysses is. Ranks of a submesh are neighbours in ``mesh.rank``, and each number of
    ranks occurs once. Collective: all ranks of the mesh call it together, once, for it makes
    process groups, and asks which ranks compute on the same cores (``shared``): those of a machine
    whose affinities overlap, if they have more threads than cores. A GPU is one rank's alone.

    Args:
        mesh: The ranks; None is one device.
        cores: That the ranks of the mesh on each machine share, where affinities do not say it: a
            container's quota of time, or cores on which others compute, too.

    Returns:
        Of falling size; the first is ``mesh``, the last None, one device.

    Raises:
        TypeError: no mesh.
        ValueError: the ranks cannot make process groups together, ``cores`` is none or not the
            same on all ranks, or they are on GPUs; says why, on all of them.
    """
    if check_mesh(mesh) is None or mesh is None or mesh.size == 1:
        return Submeshes((None,))
    told = mesh.gather_objects((comm.global_rank(), own_seat(cores, mesh.device_type)))
    ranks = [rank for rank, _ in told]
    shared = shared_cores([seat for _, seat in told])
    is_world = len(ranks) == len(comm.group_ranks(None))
    group = None if is_world else mesh.whole()[0].group
    found: list[SequenceMesh] = [mesh]
    for degrees in nested_degrees(mesh.ring_degree, mesh.ulysses_degree)[1:-1]:
        told_degrees = "submeshes of degrees {} x {}".format(*degrees)
        comm.compare_before_groups(group, told_degrees, None, None)
        found.append(mesh_among(ranks, degrees, group, mesh.device_type))
        found[-1].inside = mesh
    return Submeshes((*found, None), shared)
