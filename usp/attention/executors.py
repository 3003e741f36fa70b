"""Who computes what with whom in one call: keys move or queries, both, or neither."""

from __future__ import annotations

from usp.attention.arguments import Request
from usp.attention.given import Tensors
from usp.attention.grid import GridRing
from usp.attention.replicas import Replicas
from usp.attention.ring import Ring
from usp.distributed.comm import Axis
from usp.distributed.mesh import SequenceMesh, degrees_and_place
from usp.planning.grid import make_grid
from usp.planning.heads import Heads
from usp.planning.layout import Replicated
from usp.planning.plan import make_local_plan, make_plan
from usp.planning.query_ring import make_query_ring
from usp.planning.route import of_keys, of_query_steps
from usp.planning.sides import Moves, Sizes, which_move

ALONE = Axis(1, 0, None)
Executor = Ring | Replicas


def local_executor(
    mesh: SequenceMesh | None, heads: Heads, tensors: Tensors, request: Request
) -> tuple[Executor, Ring]:
    """Where one side is on every rank, nothing moves but results for queries that are."""
    lengths = request.query_len, request.key_len
    plan = make_local_plan(request.masks, request.layouts, lengths, *degrees_and_place(mesh))
    local = Ring(ALONE, plan, heads, request.scoring, request.backend)
    axes = () if mesh is None else tuple(x for x in (mesh.ulysses, mesh.ring) if x.size > 1)
    if axes and isinstance(request.layouts[0], Replicated):
        return Replicas(local, axes), local
    return local, local


def executors(
    mesh: SequenceMesh | None, heads: Heads, tensors: Tensors, request: Request
) -> tuple[Ring, Ring]:
    """Whether keys move, queries or both, and how, in a forward and in its backward."""
    ring, levels = (ALONE, None) if mesh is None else (mesh.ring, mesh.ring_levels)
    what = request.masks, request.layouts, (request.query_len, request.key_len), ring.size
    kv, transport = heads.kv_range[1] - heads.kv_range[0], request.transport
    dims = tensors.q.shape[3], tensors.v.shape[3]
    width = kv * sum(dims)
    if request.latent_width is not None:
        width = request.latent_width if heads.count else 0
    sizes = Sizes(tensors.q.shape[0], heads.count, width, *dims, tensors.q.dtype)
    shared = heads, request.scoring, request.backend
    outer = 1 if levels is None else levels[0].size
    moves = Moves("keys", "keys")  # they come in chunks, both ways
    if not request.in_chunks:
        grid = outer if request.latent_width is None else 1
        moves = which_move(transport, what, sizes, tensors.attn_bias is not None, grid)

    def of(move: str, backward: bool) -> Ring:
        if move == "queries":
            along = (of_query_steps(transport), outer) if backward else ("direct",)
            grid = make_query_ring(*what, ring.rank, *along)
            way = ring, levels if backward else None
            return GridRing(ALONE, grid.plans[0], *shared, None, grid, *way)
        if move == "both":
            assert levels is not None
            grid = make_grid(*what, ring.rank, outer)
            return GridRing(levels[0], grid.plans[0], *shared, None, grid, levels[1])
        return Ring(ring, make_plan(*what, ring.rank, of_keys(transport), outer), *shared, levels)

    forward = of(moves.forward, False)
    # one plan for both passes, but for queries that have a nearer way back, node by node
    alike = moves.forward == moves.backward and (moves.forward != "queries" or outer == 1)
    return forward, forward if alike else of(moves.backward, True)
