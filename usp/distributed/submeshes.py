"""Meshes of fewer ranks inside a mesh: for sequences that do not need all of it."""

from __future__ import annotations

from usp.distributed import comm
from usp.distributed.making import mesh_among
from usp.distributed.mesh import SequenceMesh, check_mesh
from usp.planning.degrees import nested_degrees


def submeshes(mesh: SequenceMesh | None) -> tuple[SequenceMesh | None, ...]:
    """The mesh, and for each smaller degree the one that this rank is in, down to one device.

    Each divides the one before: the ring is halved (divided by its smallest prime) until one row
    is left, then Ulysses is. Ranks of a submesh are neighbours in ``mesh.rank``, and each number of
    ranks occurs once. Collective: all ranks of the mesh call it together, once, for it makes
    process groups.

    Args:
        mesh: The ranks; None is one device.

    Returns:
        Of falling size; the first is ``mesh``, the last None, one device.

    Raises:
        TypeError: no mesh.
        ValueError: the ranks cannot make process groups together; says why.
    """
    if check_mesh(mesh) is None or mesh is None or mesh.size == 1:
        return (None,)
    ranks = mesh.gather_objects(comm.global_rank())
    is_world = len(ranks) == len(comm.group_ranks(None))
    group = None if is_world else mesh.whole()[0].group
    found: list[SequenceMesh | None] = [mesh]
    for degrees in nested_degrees(mesh.ring_degree, mesh.ulysses_degree)[1:-1]:
        told = "submeshes of degrees {} x {}".format(*degrees)
        comm.compare_before_groups(group, told, None, None)
        found.append(mesh_among(ranks, degrees, group, mesh.device_type))
    return (*found, None)
