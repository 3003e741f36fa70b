"""Rows of all ranks of a mesh joined, and the sums of rows that go back to their owners.

Each is the other's adjoint. Rows may be of any shape and dtype, and ranks hold any number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from usp.distributed.comm import Axis
from usp.distributed.mesh import SequenceMesh
from usp.ops.pack import pack

# Rows of each rank of each mesh row.
Held = Sequence[Sequence[int]]


def gather(mesh: SequenceMesh, x: Tensor, held: Held) -> Tensor:
    """(own rows, ...) -> (all rows, ...), in the order of the ranks.

    For n own rows of a mesh row of N, a rank sends ``n (U - 1) + N (R - 1)`` rows.
    """
    row = _gather(mesh.ulysses, x, held[mesh.ring_rank])
    return _gather(mesh.ring, row, [sum(lengths) for lengths in held])


def reduce_scatter(mesh: SequenceMesh, x: Tensor, held: Held) -> Tensor:
    """(all rows, ...) -> (own rows, ...), summed over the ranks in their order.

    A rank sends the rows of other mesh rows, then those of the others of its own.
    """
    row = _reduce_scatter(mesh.ring, x, [sum(lengths) for lengths in held])
    return _reduce_scatter(mesh.ulysses, row, held[mesh.ring_rank])


class Gather(torch.autograd.Function):
    """``gather``, with derivatives of every order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: SequenceMesh, held: Held) -> Tensor:
        ctx.mesh, ctx.held = mesh, held
        return gather(mesh, x, held)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return cast(Tensor, ReduceScatter.apply(grad, ctx.mesh, ctx.held)), None, None


class ReduceScatter(torch.autograd.Function):
    """``reduce_scatter``, likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: SequenceMesh, held: Held) -> Tensor:
        ctx.mesh, ctx.held = mesh, held
        return reduce_scatter(mesh, x, held)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return cast(Tensor, Gather.apply(grad, ctx.mesh, ctx.held)), None, None


def _gather(axis: Axis, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """(n, ...) of every rank, joined in rank order."""
    if axis.size == 1:
        return x
    sizes = _sizes(x, lengths)
    whole = torch.empty(sum(sizes), dtype=torch.uint8, device=x.device)
    axis.all_gather(message(x), whole, sizes)()
    return whole.view(x.dtype).view(sum(lengths), *x.shape[1:])


def _reduce_scatter(axis: Axis, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """The adjoint: this rank's part of the sum over ranks, added in rank order."""
    if axis.size == 1:
        return x
    sizes, mine = _sizes(x, lengths), lengths[axis.rank]
    parts = axis.all_to_all(message(x), sizes, [sizes[axis.rank]] * axis.size)
    return parts.view(x.dtype).view(axis.size, mine, *x.shape[1:]).sum(0)


def exchange(axis: Axis, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
    """Rows (sum of ``send``, ...) to each rank of the axis, and those from each: one uneven
    exchange."""
    if axis.size == 1:
        return x
    got = axis.all_to_all(message(x), _sizes(x, send), _sizes(x, recv))
    return got.view(x.dtype).view(sum(recv), *x.shape[1:])


def _sizes(x: Tensor, lengths: Sequence[int]) -> list[int]:
    """Bytes of so many items of x."""
    width = x.shape[1:].numel() * x.element_size()
    return [length * width for length in lengths]


def message(x: Tensor) -> Tensor:
    """The bytes of x: what carries messages knows few dtypes."""
    x = x.resolve_conj().resolve_neg()
    return pack([x])
