"""The join of a sequence, and its adjoint: once for autograd, and as ops for who must see it whole.

A graph of ``torch.compile`` and tensors that have shapes alone know the op ``usp::unshard``; it has
an effect, as that of attention, and meets the other ranks where it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from usp.distributed.agreement import Facts, meet_before_backward, meet_in_backward
from usp.distributed.graph import has_effect, saved_in_graph
from usp.distributed.mesh import SequenceMesh, degrees_and_place, mesh_of
from usp.planning.layout import Layout, from_told, rows, told
from usp.planning.shares import row_pieces
from usp.sharding.collectives import gather, reduce_scatter
from usp.sharding.whole import agree_on_length

_LIBRARY = torch.library.Library("usp", "FRAGMENT")
_SEQUENCE = "int dim, str layout, int[]? numbers, SymInt seq_len, str mesh"


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
    name, numbers = told(layout)
    needed = torch.is_grad_enabled() and x.requires_grad
    whole, _ = torch.ops.usp.unshard(
        x.movedim(dim, 0), dim, name, numbers, seq_len, mesh.name, validate, needed
    )
    return cast(Tensor, whole.movedim(0, dim))


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
    needed: bool,
) -> tuple[Tensor, Tensor]:
    on, placed = mesh_of(mesh), from_told(layout, None if numbers is None else tuple(numbers))

    def more() -> Facts:
        return {"gradient needed": needed}

    given = x.movedim(0, dim)
    place = "unshard_sequence"
    _, name = agree_on_length(place, given, on, dim, placed, seq_len, validate, more)
    return join(x, on, placed, seq_len), torch.tensor(name or 0, device="cpu")


def _parted(
    grad: Tensor,
    name: Tensor,
    local: int,
    dim: int,
    layout: str,
    numbers: Sequence[int] | None,
    seq_len: int,
    mesh: str,
) -> Tensor:
    on, placed = mesh_of(mesh), from_told(layout, None if numbers is None else tuple(numbers))
    if name:
        meet_before_backward(on, int(name))
    return part(grad, on, placed, seq_len)


def _fake_joined(x: Tensor, _dim: int, *others: Any) -> tuple[Tensor, Tensor]:
    seq_len = others[2]
    whole = x.new_empty((seq_len, *x.shape[1:]))
    return whole, torch.empty((), dtype=torch.int64, device="cpu")


def _fake_parted(grad: Tensor, _name: Tensor, local: int, *_: Any) -> Tensor:
    return grad.new_empty((local, *grad.shape[1:]))


class _InGraph(torch.autograd.Function):
    """Autograd over the two ops."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        whole, name = _below_autograd(x, *others)
        ctx.save_for_backward(name)
        ctx.mark_non_differentiable(name)
        ctx.sequence = x.shape[0], *others[:-2]
        return whole, name

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        (name,) = ctx.saved_tensors
        dx = torch.ops.usp.unshard_adjoint(grad, name, *ctx.sequence)
        return dx, *(None,) * (len(ctx.sequence) + 1)


def _below_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    with saved_in_graph(), torch._C._AutoDispatchBelowAutograd():
        whole, name = torch.ops.usp.unshard(*args)
    return whole, name


def _differentiable(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and x.requires_grad:
        return cast("tuple[Tensor, Tensor]", _InGraph.apply(x, *others))
    return _below_autograd(x, *others)


def _register() -> None:
    for name, signature, kernel, fake in (
        (
            "unshard",
            f"(Tensor x, {_SEQUENCE}, bool? validate, bool needed) -> (Tensor, Tensor)",
            _joined,
            _fake_joined,
        ),
        (
            "unshard_adjoint",
            f"(Tensor grad, Tensor name, SymInt local, {_SEQUENCE}) -> Tensor",
            _parted,
            _fake_parted,
        ),
    ):
        _LIBRARY.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"usp::{name}", fake, lib=_LIBRARY)
        has_effect(getattr(torch.ops.usp, name).default)
    _LIBRARY.impl("unshard", _differentiable, "Autograd")


_register()
