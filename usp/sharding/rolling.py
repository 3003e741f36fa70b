"""All tokens of a spread sequence some places on: for autograd, and as an op of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from usp.distributed.agreement import Facts, meet_in_backward
from usp.distributed.mesh import SequenceMesh, degrees_and_place, mesh_of
from usp.planning.kinds import graph_integer, integer
from usp.planning.layout import Layout, from_told, told
from usp.planning.moves import Moves, shift_moves
from usp.sharding import in_graph
from usp.sharding.collectives import exchange
from usp.sharding.whole import agree_on_length, checked_dim


def roll(
    x: Tensor,
    mesh: SequenceMesh | None,
    shift: int,
    dim: int,
    layout: Layout,
    seq_len: int | None,
    validate: bool | None,
) -> Tensor:
    """``usp.roll``; arguments and result as there."""
    length, name = _agree(x, mesh, shift, dim, layout, seq_len, validate)
    shift = integer("shift", shift) % max(length, 1)
    if mesh is None or mesh.size == 1:
        return x.roll(shift, dim)
    sequence = layout, length
    rolled = cast(Tensor, _Roll.apply(x.movedim(dim, 0), mesh, sequence, shift))
    if name is not None:
        meet_in_backward(rolled, mesh, name)
    return rolled.movedim(0, dim)


def roll_in_graph(
    x: Tensor,
    mesh: SequenceMesh,
    shift: int,
    dim: int,
    layout: Layout,
    seq_len: int,
    validate: bool | None,
) -> Tensor:
    """The same through the op."""
    dim, shift = checked_dim(x, dim), graph_integer("shift", shift)
    settings = shift, dim, *told(layout), seq_len, mesh.name
    return in_graph.call("roll", x.movedim(dim, 0), *settings, validate=validate).movedim(0, dim)


def _agree(
    x: Tensor,
    mesh: SequenceMesh | None,
    shift: int,
    dim: int,
    layout: Layout,
    seq_len: int | None,
    validate: bool | None,
    more: Callable[[], Facts] = dict,
) -> tuple[int, int | None]:
    """Tokens of the whole, and the name of a call that met."""

    def facts() -> Facts:
        return {"shift": integer("shift", shift)} | more()

    return agree_on_length("usp.roll", x, mesh, dim, layout, seq_len, validate, facts)


class _Roll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mesh: SequenceMesh, sequence: tuple[Layout, int], shift: int
    ) -> Tensor:
        ctx.mesh, ctx.sequence, ctx.shift = mesh, sequence, shift
        return _move(x, mesh, sequence, shift)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = -ctx.shift % max(ctx.sequence[1], 1)
        return cast(Tensor, _Roll.apply(grad, ctx.mesh, ctx.sequence, back)), None, None, None


def _move(x: Tensor, mesh: SequenceMesh, sequence: tuple[Layout, int], shift: int) -> Tensor:
    """(rows before, ...) -> (rows after, ...)."""
    moves: Moves = shift_moves(*sequence, *degrees_and_place(mesh), shift)
    (before, after), leaves, passes, arrives = moves.on(x.device)
    row = exchange(mesh.ulysses, x.index_select(0, leaves), moves.row_send, moves.row_recv)
    came = exchange(mesh.ring, row.index_select(0, passes), moves.ring_send, moves.ring_recv)
    out = x.new_empty(x.shape)
    out[after] = x[before]
    out[arrives] = came
    return out


def _apply(
    x: Tensor,
    shift: int,
    dim: int,
    layout: str,
    numbers: Sequence[int] | None,
    seq_len: int,
    mesh: str,
    validate: bool | None,
    more: Callable[[], Facts],
) -> tuple[Tensor, int | None]:
    on, placed, given = mesh_of(mesh), from_told(layout, numbers), x.movedim(0, dim)
    length, name = _agree(given, on, shift, dim, placed, seq_len, validate, more)
    return _move(x, on, (placed, length), shift % max(length, 1)), name


def _adjoint(
    grad: Tensor,
    local: int,
    shift: int,
    dim: int,
    layout: str,
    numbers: Sequence[int] | None,
    seq_len: int,
    mesh: str,
) -> Tensor:
    sequence = from_told(layout, numbers), seq_len
    return _move(grad, mesh_of(mesh), sequence, -shift % max(seq_len, 1))


in_graph.register(
    in_graph.Collective(
        "roll",
        "SymInt shift, int dim, str layout, int[]? numbers, SymInt seq_len, str mesh",
        _apply,
        _adjoint,
        lambda local, *_: local,
    )
)
