"""A few rows of a spread sequence, and all of them a few places on: only what must crosses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from usp.distributed.agreement import Facts, meet_in_backward
from usp.distributed.comm import untraced
from usp.distributed.mesh import SequenceMesh, degrees_and_place
from usp.planning.kinds import integer
from usp.planning.layout import Layout
from usp.planning.moves import Moves, shift_moves
from usp.planning.shares import owners
from usp.sharding.collectives import Gather, exchange
from usp.sharding.whole import agree_on_length, checked_dim


def take(
    x: Tensor,
    mesh: SequenceMesh | None,
    rows: Sequence[int] | Tensor,
    dim: int = 1,
    layout: Layout = "contiguous",
    seq_len: int | None = None,
    *,
    validate: bool | None = None,
) -> Tensor:
    """A few tokens of a spread sequence, on every rank: class tokens, registers.

    Just these tokens cross ranks: for n of N that this mesh row holds, this rank sends
    ``n (ulysses_degree - 1) + N (ring_degree - 1)`` of them, each of different ones once.

    The gradient is the adjoint, as that of ``unshard_sequence``: the sum of what every rank's copy
    got. So the loss of the whole is the sum over ranks; a loss that all ranks compute alike is
    divided by ``mesh.size`` first. Derivatives of every order.

    Args:
        x: (..., local tokens, ...), any dtype.
        mesh: The ranks that share the sequence; None is one device.
        rows: Global positions, in any order, also repeated; the same on every rank. Negative ones
            count from the end of the whole sequence.
        dim: The sequence dim.
        layout: As the sequence was cut.
        seq_len: Tokens of the whole; by default the sum of what the ranks hold.
        validate: Whether the ranks compare their arguments first; see ``long_context_attention``.
            A length that nobody named is asked for in any case.

    Returns:
        (..., len(rows), ...) in the order of ``rows``.

    Raises:
        TypeError: a row is no integer.
        ValueError: there is no such row, this rank's share of ``seq_len`` is not what ``x`` holds,
            or another rank refuses or was asked for something else; names both.
    """
    run = _take if mesh is None else _take_on_mesh
    return run(x, mesh, rows, dim, layout, seq_len, validate)


def _take(
    x: Tensor,
    mesh: SequenceMesh | None,
    rows: Sequence[int] | Tensor,
    dim: int,
    layout: Layout,
    seq_len: int | None,
    validate: bool | None,
) -> Tensor:
    asked: list[int] = []

    def more() -> Facts:
        asked.extend(_integers(rows))
        return {"rows": asked}

    length, name = agree_on_length("usp.take", x, mesh, dim, layout, seq_len, validate, more)
    for row in asked:
        if not -length <= row < length:
            raise ValueError(f"there is no row {row} in a sequence of {length} tokens")
    asked = [row % length for row in asked]
    dim = checked_dim(x, dim)
    if mesh is None or mesh.size == 1:
        return x.index_select(dim, torch.tensor(asked, dtype=torch.int64, device=x.device))
    wanted, place = torch.tensor(asked, dtype=torch.int64, device="cpu").unique(return_inverse=True)
    degrees, _ = degrees_and_place(mesh)
    owner, index = owners(layout, length, degrees, wanted)
    mine = index[owner == mesh.rank].to(x.device)
    counts = owner.bincount(minlength=mesh.size).view(degrees).tolist()
    local = x.index_select(dim, mine).movedim(dim, 0)
    joined = cast(Tensor, Gather.apply(local, mesh, counts))
    if name is not None:
        meet_in_backward(joined, mesh, name)
    # ``joined`` is in the order of the ranks, and each one's in that of positions
    place = owner.argsort(stable=True).argsort()[place].to(x.device)
    return joined.index_select(0, place).movedim(0, dim)


_take_on_mesh = untraced(_take)


def _integers(rows: Sequence[int] | Tensor) -> list[int]:
    if isinstance(rows, Tensor) and rows.dim() == 1:
        rows = cast("list[int]", rows.tolist())
    if isinstance(rows, Tensor | str) or not isinstance(rows, Sequence | range):
        raise TypeError(f"rows must be a list of positions, got {rows!r}")
    return [integer("a row", row) for row in rows]


def roll(
    x: Tensor,
    mesh: SequenceMesh | None,
    shift: int,
    dim: int = 1,
    layout: Layout = "contiguous",
    seq_len: int | None = None,
    *,
    validate: bool | None = None,
) -> Tensor:
    """``torch.roll`` over the whole of a spread sequence: the token of position p comes to stand
    at ``(p + shift) % seq_len``, wherever that is.

    For shifted windows, what reaches over the edge of a shard (a causal convolution adds rolled
    ones and hides those that came round), and targets (``roll(tokens, mesh, -1)``). Just the
    tokens that change rank cross: once along the axis of the mesh on which their rank changes,
    along both where it does on both. The gradient rolls back. Derivatives of every order.

    Args:
        x: (..., local tokens, ...), any dtype.
        mesh: The ranks that share the sequence; None is one device.
        shift: Places, also negative or more than there are; the same on every rank.
        dim: The sequence dim.
        layout: As the sequence was cut.
        seq_len: Tokens of the whole; by default the sum of what the ranks hold.
        validate: Whether the ranks compare their arguments first; see ``long_context_attention``.
            A length that nobody named is asked for in any case.

    Returns:
        (..., local tokens, ...).

    Raises:
        TypeError: ``shift`` is no integer.
        ValueError: this rank's share of ``seq_len`` is not what ``x`` holds, or another rank
            refuses or was asked for something else; names both.
    """
    run = _roll if mesh is None else _roll_on_mesh
    return run(x, mesh, shift, dim, layout, seq_len, validate)


def _roll(
    x: Tensor,
    mesh: SequenceMesh | None,
    shift: int,
    dim: int,
    layout: Layout,
    seq_len: int | None,
    validate: bool | None,
) -> Tensor:
    length, name = agree_on_length(
        "usp.roll",
        x,
        mesh,
        dim,
        layout,
        seq_len,
        validate,
        lambda: {"shift": integer("shift", shift)},
    )
    shift = integer("shift", shift) % max(length, 1)
    if mesh is None or mesh.size == 1:
        return x.roll(shift, dim)
    sequence = layout, length
    rolled = cast(Tensor, _Roll.apply(x.movedim(dim, 0), mesh, sequence, shift))
    if name is not None:
        meet_in_backward(rolled, mesh, name)
    return rolled.movedim(0, dim)


_roll_on_mesh = untraced(_roll)


class _Roll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mesh: SequenceMesh, sequence: tuple[Layout, int], shift: int
    ) -> Tensor:
        ctx.mesh, ctx.sequence, ctx.shift = mesh, sequence, shift
        return _move(x, mesh, shift_moves(*sequence, *degrees_and_place(mesh), shift))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = -ctx.shift % max(ctx.sequence[1], 1)
        return cast(Tensor, _Roll.apply(grad, ctx.mesh, ctx.sequence, back)), None, None, None


def _move(x: Tensor, mesh: SequenceMesh, moves: Moves) -> Tensor:
    """(rows before, ...) -> (rows after, ...)."""
    (before, after), leaves, passes, arrives = moves.on(x.device)
    row = exchange(mesh.ulysses, x.index_select(0, leaves), moves.row_send, moves.row_recv)
    came = exchange(mesh.ring, row.index_select(0, passes), moves.ring_send, moves.ring_recv)
    out = x.new_empty(x.shape)
    out[after] = x[before]
    out[arrives] = came
    return out
