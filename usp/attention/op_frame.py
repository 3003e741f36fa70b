"""What the ops of attention share: their overloads, and autograd over each and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from usp.attention.op_arguments import TENSORS, Arguments
from usp.distributed.graph import has_effect, saved_in_graph
from usp.distributed.mesh import SequenceMesh
from usp.ops.derivatives import (
    OnceDifferentiable,
    refuse_transforms,
    without_second_derivative,
)

LIBRARY = torch.library.Library("usp", "FRAGMENT")
OVERLOADS = "default", "mesh"
# An op's arguments are those of attention, and behind them tensors of its own.
NUMBER = len(Arguments._fields)
_BIAS = Arguments._fields.index("attn_bias")
Found = tuple[Tensor, Tensor, list[Tensor]]


def called(
    op: str, args: Sequence[Any], mesh: SequenceMesh | None, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """``out``, or ``out, lse``, of the op by that name."""
    overload = "mesh" if mesh is not None and torch.compiler.is_compiling() else "default"
    out, lse, _ = getattr(getattr(torch.ops.usp, op), overload)(*args)
    return (out, lse) if return_lse else out


def register(op: str, arguments: str, kernels: Sequence[Callable[..., Any]], results: str) -> None:
    """An op, that of its gradients, and an overload ``mesh`` of each, which has an effect.

    Args:
        arguments: Its schema.
        kernels: Of the op and of its gradients, each followed by what does it with fake tensors.
        results: The schema of the gradients.
    """
    forward, fake_forward, gradients, fake_gradients = kernels
    schema = f"({arguments}) -> (Tensor out, Tensor lse, Tensor[] kept)"
    of_gradients = (
        "(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor[] kept, bool bias_gradient, "
        f"{arguments}) -> ({results})"
    )
    _define(op, schema, forward, fake_forward)
    _define(f"{op}_gradients", of_gradients, gradients, fake_gradients)
    for overload in OVERLOADS:
        LIBRARY.impl(_name(op, overload), partial(_differentiable, op, overload), "Autograd")


def _name(op: str, overload: str) -> str:
    return op if overload == "default" else f"{op}.{overload}"


def _define(op: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    for overload in OVERLOADS:
        name = _name(op, overload)
        LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"usp::{name}", fake, lib=LIBRARY)
    has_effect(getattr(torch.ops.usp, op).mesh)


class _Attention(OnceDifferentiable):
    """Autograd over the two ops."""

    @staticmethod
    def forward(ctx: Any, op: str, overload: str, *args: Any) -> Found:
        given, own = Arguments(*args[:NUMBER]), args[NUMBER:]
        out, lse, kept = _below_autograd(op, overload, *args)
        ctx.save_for_backward(*given.held, *own, out, lse, *kept)
        ctx.op, ctx.overload, ctx.number_of_own = f"{op}_gradients", overload, len(own)
        ctx.settings = args[TENSORS:NUMBER]
        ctx.mesh = given.on  # is found by name, as long as somebody holds it
        ctx.set_materialize_grads(False)
        if not given.return_lse:
            ctx.mark_non_differentiable(lse)
        return out, lse, kept

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint gives each of them away
        held, rest = saved[:TENSORS], saved[TENSORS:]
        own, (out, lse, *kept) = rest[: ctx.number_of_own], rest[ctx.number_of_own :]
        bias_gradient = ctx.needs_input_grad[2 + _BIAS]
        if dout is None:
            dout = torch.zeros_like(out)
        with torch.no_grad():
            found = getattr(getattr(torch.ops.usp, ctx.op), ctx.overload)(
                *(dout, dlse, out, lse, kept, bias_gradient), *held, *ctx.settings, *own
            )
        gradients: list[Any] = [None] * (NUMBER + len(own))
        places = (0, *range(NUMBER, NUMBER + len(own))) if own else (0, 1, 2, _BIAS)
        for place, x in zip(
            places, without_second_derivative(found, (dout, dlse, out)), strict=True
        ):
            gradients[place] = x
        if not bias_gradient:
            gradients[_BIAS] = None
        return None, None, *gradients


def _below_autograd(op: str, overload: str, *args: Any) -> Found:
    """An op as it is without gradients; in a graph on a mesh it is saved."""
    once = nullcontext() if overload == "default" else saved_in_graph()
    with once, torch._C._AutoDispatchBelowAutograd():
        out, lse, kept = getattr(getattr(torch.ops.usp, op), overload)(*args)
    return out, lse, kept


def _differentiable(op: str, overload: str, *args: Any) -> Found:
    tensors = (*Arguments(*args[:NUMBER]).tensors, *args[NUMBER:])
    refuse_transforms(tensors)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        out, lse, kept = _Attention.apply(op, overload, *args)
        return out, lse, kept
    return _below_autograd(op, overload, *args)
