"""A linear collective and its adjoint, as two ops for who must see them whole.

A graph of ``torch.compile`` and tensors that have shapes alone know the ops; these have an effect,
as that of attention, and meet the other ranks where they run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from usp.distributed.agreement import Facts, meet_before_backward, meet_without_values
from usp.distributed.graph import has_effect, saved_in_graph
from usp.distributed.mesh import SequenceMesh, mesh_of
from usp.planning.kinds import is_fake

_LIBRARY = torch.library.Library("usp", "FRAGMENT")


class Collective(NamedTuple):
    """What ranks do together with rows of theirs.

    Attributes:
        name: Of the op.
        settings: In the words of a schema; the last is ``str mesh``, the name of the mesh.
        apply: (own rows, ...), the settings, ``validate`` and what else all ranks must agree on
            -> the result, rows first, and the name of the call where the ranks have met.
        adjoint: The gradient of the result, how many rows were own, and the settings -> that of
            the own rows.
        rows: Own rows and the settings -> rows of the result.
    """

    name: str
    settings: str
    apply: Callable[..., tuple[Tensor, int | None]]
    adjoint: Callable[..., Tensor]
    rows: Callable[..., int]


def is_in_graph(x: Tensor, mesh: SequenceMesh | None) -> bool:
    """Whether the tensor of this call has no values, and there are other ranks to meet."""
    return mesh is not None and mesh.size > 1 and (torch.compiler.is_compiling() or is_fake(x))


def call(name: str, x: Tensor, *settings: Any, validate: bool | None) -> Tensor:
    """A collective through its op.

    Args:
        name: See ``Collective``.
        x: (own rows, ...).
        settings: As registered.
        validate: As in ``agreement.meets``.
    """
    if not torch.compiler.is_compiling() and is_fake(x):
        meet_without_values(mesh_of(settings[-1]), validate)
    needed = torch.is_grad_enabled() and x.requires_grad
    out, _ = getattr(torch.ops.usp, name)(x, *settings, validate, needed)
    return cast(Tensor, out)


def register(collective: Collective) -> None:
    """Define both ops."""
    name, settings = collective.name, collective.settings
    ahead = f"(Tensor x, {settings}, bool? validate, bool needed) -> (Tensor, Tensor)"
    back = f"(Tensor grad, Tensor name, SymInt local, {settings}) -> Tensor"

    def apply(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        *given, validate, needed = args

        def more() -> Facts:
            return {"gradient needed": needed}

        out, met = collective.apply(x, *given, validate, more)
        return out, torch.tensor(met or 0, device="cpu")

    def adjoint(grad: Tensor, met: Tensor, local: int, *given: Any) -> Tensor:
        if met:
            meet_before_backward(mesh_of(given[-1]), int(met))
        return collective.adjoint(grad, local, *given)

    def fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        out = x.new_empty((collective.rows(x.shape[0], *args[:-2]), *x.shape[1:]))
        return out, torch.empty((), dtype=torch.int64, device="cpu")

    def fake_adjoint(grad: Tensor, _met: Tensor, local: int, *_: Any) -> Tensor:
        return grad.new_empty((local, *grad.shape[1:]))

    def differentiable(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and x.requires_grad:
            return cast("tuple[Tensor, Tensor]", _InGraph.apply(name, x, *others))
        return _below_autograd(name, x, *others)

    for op, schema, kernel, shapes in (
        (name, ahead, apply, fake),
        (f"{name}_adjoint", back, adjoint, fake_adjoint),
    ):
        _LIBRARY.define(f"{op}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"usp::{op}", shapes, lib=_LIBRARY)
        has_effect(getattr(torch.ops.usp, op).default)
    _LIBRARY.impl(name, differentiable, "Autograd")


class _InGraph(torch.autograd.Function):
    """Autograd over the two ops."""

    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        out, met = _below_autograd(name, x, *others)
        ctx.name, ctx.local, ctx.settings = name, x.shape[0], list(others[:-2])
        ctx.tensors = [i for i, each in enumerate(ctx.settings) if isinstance(each, Tensor)]
        ctx.save_for_backward(met, *(ctx.settings[i] for i in ctx.tensors))
        for i in ctx.tensors:
            ctx.settings[i] = None
        ctx.mesh = mesh_of(ctx.settings[-1])  # is found by name, as long as somebody holds it
        ctx.mark_non_differentiable(met)
        return out, met

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        met, *tensors = ctx.saved_tensors
        settings = list(ctx.settings)
        for i, each in zip(ctx.tensors, tensors, strict=True):
            settings[i] = each
        adjoint = getattr(torch.ops.usp, f"{ctx.name}_adjoint")
        return None, adjoint(grad, met, ctx.local, *settings), *(None,) * (len(settings) + 2)


def _below_autograd(name: str, *args: Any) -> tuple[Tensor, Tensor]:
    with saved_in_graph(), torch._C._AutoDispatchBelowAutograd():
        out, met = getattr(torch.ops.usp, name)(*args)
    return out, met
