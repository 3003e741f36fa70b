"""Cut a sequence into this rank's tokens and join it again; both differentiable."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from usp.distributed.agreement import meet_in_backward
from usp.distributed.comm import out_of_sight, untraced
from usp.distributed.mesh import SequenceMesh, degrees_and_place
from usp.planning.kinds import integer
from usp.planning.layout import Layout, check_layout, rows
from usp.planning.shares import local_positions, row_pieces
from usp.sharding.collectives import gather, reduce_scatter
from usp.sharding.whole import agree_on_length, checked_dim


def positions(
    seq_len: int,
    mesh: SequenceMesh | None,
    layout: Layout = "contiguous",
    device: torch.device | str | None = None,
) -> Tensor:
    """Global positions of this rank's tokens, for RoPE and position tables.

    Args:
        seq_len: Tokens of the whole sequence.
        mesh: The ranks that share it; None is one device.
        layout: Which token is where.
        device: Where the result lies; CPU by default.

    Returns:
        (local tokens,) int64, ascending.

    Raises:
        ValueError: the layout is unknown or made for another length.
    """
    (ring, ulysses), rank = degrees_and_place(mesh)
    seq_len = integer("seq_len", seq_len, least=0)
    check_layout(layout)
    if torch.compiler.is_compiling():
        return local_positions(layout, seq_len, ring, ulysses, rank).to(device)
    with out_of_sight():  # a first call makes tables that later ones find
        return local_positions(layout, seq_len, ring, ulysses, rank).to(device)


def shard_sequence(
    x: Tensor, mesh: SequenceMesh | None, dim: int, layout: Layout = "contiguous"
) -> Tensor:
    """This rank's tokens of a sequence that every rank holds whole.

    Lengths that do not divide are cut unevenly, never padded. The gradient is this rank's part:
    zero at the tokens of other ranks.

    Args:
        x: (..., seq_len, ...), the same on every rank.
        mesh: The ranks that share the sequence; None is one device.
        dim: The sequence dim.
        layout: Which token goes where.

    Returns:
        (..., local tokens, ...), contiguous.
    """
    dim = checked_dim(x, dim)
    index = positions(x.shape[dim], mesh, layout, x.device)
    return x.index_select(dim, index)


def unshard_sequence(
    x: Tensor,
    mesh: SequenceMesh | None,
    dim: int,
    layout: Layout = "contiguous",
    seq_len: int | None = None,
    *,
    validate: bool | None = True,
) -> Tensor:
    """The whole sequence on every rank, in global order.

    The gradient is the adjoint: the sum of what every rank's whole sequence got. So the loss of
    the whole is the sum over ranks; a loss that all ranks compute alike is divided by
    ``mesh.size`` first.

    Args:
        x: (..., local tokens, ...).
        mesh: The ranks that share the sequence; None is one device.
        dim: The sequence dim.
        layout: As the sequence was cut.
        seq_len: Tokens of the whole; by default the sum of what the ranks hold.
        validate: Compare what all ranks hold first, so that a disagreement raises on every rank
            instead of hanging: 48 bytes along each axis of the mesh, for which a GPU is waited
            unless the ranks can talk on the host. False where all are known to fit, in a loop
            that must not wait and passes ``seq_len``, which is asked for otherwise. None: on CPUs
            always, elsewhere where a length must be asked for.

    Raises:
        ValueError: this rank's share of ``seq_len`` is not what ``x`` holds, or (``validate``)
            another rank refuses or holds something else; names both.
    """
    if mesh is None:
        checked_dim(x, dim)
        return x
    return _unshard(x, mesh, dim, layout, seq_len, validate)


@untraced
def _unshard(
    x: Tensor,
    mesh: SequenceMesh,
    dim: int,
    layout: Layout,
    seq_len: int | None,
    validate: bool | None,
) -> Tensor:
    seq_len, name = agree_on_length("unshard_sequence", x, mesh, dim, layout, seq_len, validate)
    whole = cast(Tensor, _Unshard.apply(x.movedim(dim, 0), mesh, layout, seq_len))
    if name is not None:
        meet_in_backward(whole, mesh, name)
    return whole.movedim(0, dim)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: SequenceMesh, layout: Layout, seq_len: int) -> Tensor:
        ctx.mesh, ctx.layout, ctx.seq_len = mesh, layout, seq_len
        joined = gather(mesh, x, row_pieces(layout, seq_len, *degrees_and_place(mesh)[0]))
        return joined.index_select(0, _order(layout, seq_len, mesh).argsort().to(x.device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mesh, layout, seq_len = ctx.mesh, ctx.layout, ctx.seq_len
        joined = grad.index_select(0, _order(layout, seq_len, mesh).to(grad.device))
        held = row_pieces(layout, seq_len, *degrees_and_place(mesh)[0])
        return reduce_scatter(mesh, joined, held), None, None, None


def _order(layout: Layout, seq_len: int, mesh: SequenceMesh) -> Tensor:
    """Global position of each token when the rows are joined one behind the other."""
    return torch.cat([row.tensor for row in rows(layout, seq_len, mesh.ring_degree)])
