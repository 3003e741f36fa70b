"""The join of a sequence, and its adjoint: for autograd, and as an op of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from usp.distributed.agreement import Facts, meet_in_backward
from usp.distributed.mesh import SequenceMesh, degrees_and_place, mesh_of
from usp.planning.layout import Layout, from_told, rows, told
from usp.planning.shares import row_pieces
from usp.sharding import in_graph
from usp.sharding.collectives import gather, reduce_scatter
from usp.sharding.whole import agree_on_length


def unshard(
    x: Tensor,
    mesh: SequenceMesh,
    dim: int,
    layout: Layout,
    seq_len: int | None,
    validate: bool | None,
) -> Tensor:
    """``unshard_sequence`` on a mesh; arguments and result as there."""
    seq_len, name = agree_on_length("unshard_sequence", x, mesh, dim, layout, seq_len, validate)
    whole = cast(Tensor, _Unshard.apply(x.movedim(dim, 0), mesh, layout, seq_len))
    if name is not None:
        meet_in_backward(whole, mesh, name)
    return whole.movedim(0, dim)


def unshard_in_graph(
    x: Tensor, mesh: SequenceMesh, dim: int, layout: Layout, seq_len: int, validate: bool | None
) -> Tensor:
    """The same through the op."""
    settings = dim, *told(layout), seq_len, mesh.name
    return in_graph.call("unshard", x.movedim(dim, 0), *settings, validate=validate).movedim(0, dim)


def join(x: Tensor, mesh: SequenceMesh, layout: Layout, seq_len: int) -> Tensor:
    """(own tokens, ...) -> (all tokens, ...) in global order."""
    joined = gather(mesh, x, row_pieces(layout, seq_len, *degrees_and_place(mesh)[0]))
    return joined.index_select(0, _order(layout, seq_len, mesh).argsort().to(x.device))


def part(grad: Tensor, mesh: SequenceMesh, layout: Layout, seq_len: int) -> Tensor:
    """The adjoint: (all tokens, ...) -> (own tokens, ...), summed over the ranks."""
    joined = grad.index_select(0, _order(layout, seq_len, mesh).to(grad.device))
    return reduce_scatter(mesh, joined, row_pieces(layout, seq_len, *degrees_and_place(mesh)[0]))


def _order(layout: Layout, seq_len: int, mesh: SequenceMesh) -> Tensor:
    """Global position of each token when the rows are joined one behind the other."""
    return torch.cat([row.tensor for row in rows(layout, seq_len, mesh.ring_degree)])


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *sequence: Any) -> Tensor:
        ctx.sequence = sequence
        return join(x, *sequence)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return part(grad, *ctx.sequence), None, None, None


def _joined(
    x: Tensor,
    dim: int,
    layout: str,
    numbers: Sequence[int] | None,
    seq_len: int,
    mesh: str,
    validate: bool | None,
    more: Callable[[], Facts],
) -> tuple[Tensor, int | None]:
    on, placed = mesh_of(mesh), from_told(layout, numbers)
    given = x.movedim(0, dim)
    place = "unshard_sequence"
    _, name = agree_on_length(place, given, on, dim, placed, seq_len, validate, more)
    return join(x, on, placed, seq_len), name


def _parted(
    grad: Tensor,
    local: int,
    dim: int,
    layout: str,
    numbers: Sequence[int] | None,
    seq_len: int,
    mesh: str,
) -> Tensor:
    return part(grad, mesh_of(mesh), from_told(layout, numbers), seq_len)


in_graph.register(
    in_graph.Collective(
        "unshard",
        "int dim, str layout, int[]? numbers, SymInt seq_len, str mesh",
        _joined,
        _parted,
        lambda local, dim, layout, numbers, seq_len, mesh: seq_len,
    )
)
