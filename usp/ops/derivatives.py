"""What our autograd Functions are differentiated by, and what they refuse: reverse mode, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

_FORWARD_MODE = (
    "{} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian; "
    "torch.autograd.forward_ad): use reverse mode, backward() or torch.autograd.grad"
)
_TRANSFORM = (
    "{} is not differentiated by torch.func (grad, vjp, jacrev): use backward() or "
    "torch.autograd.grad, and torch.func.vmap for a batch"
)
_IN_A_TRANSFORM = (
    "{} does not run inside of torch.func (grad, vjp, jacrev, jvp, vmap): differentiate by "
    "backward() or torch.autograd.grad, and hand a batch over as one"
)
_TWICE = (
    "{} has no second derivative (create_graph=True, a gradient penalty, a Hessian): "
    "write it as plain torch operations where you need one"
)


def is_differentiated(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd has to hear of what is computed with them, or forward mode to be refused."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class OnceDifferentiable(torch.autograd.Function):
    """A function of autograd that says what it cannot.

    Attributes:
        of: What it is called there.
    """

    of = "attention"

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        refuse_in_transforms(cls.of)  # where torch says what the class lacks
        return super().apply(*args, **kwargs)

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> NoReturn:
        raise NotImplementedError(_FORWARD_MODE.format(cls.of))


class _Constant(torch.autograd.Function):
    """Gradients that depend on ``origins``, and have no derivative by them."""

    @staticmethod
    def forward(
        ctx: Any, of: str, count: int, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.of = of
        return tuple(None if x is None else x.view_as(x) for x in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise NotImplementedError(_TWICE.format(ctx.of))


def without_second_derivative(
    gradients: Sequence[Tensor | None], origins: Sequence[Tensor | None], of: str = "attention"
) -> tuple[Tensor | None, ...]:
    """The results of a backward; where a graph of it is asked for, one that ends in a refusal.

    Args:
        gradients: What the backward computed.
        origins: What it depends on, with its history; else autograd would find no way from the
            gradients to the inputs, and say that they do not depend on each other.
        of: What has none.
    """
    if not torch.is_grad_enabled():
        return tuple(gradients)
    found = _Constant.apply(of, len(origins), *origins, *gradients)
    return cast("tuple[Tensor | None, ...]", found)


def refuse_in_transforms(of: str) -> None:
    """Refuse what runs outside of all transforms of torch.func alone.

    Raises:
        NotImplementedError: this is inside of one.
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(_IN_A_TRANSFORM.format(of))


def refuse_transforms(tensors: Sequence[Tensor | None]) -> None:
    """Refuse what an op below autograd would answer with zeros, or not at all.

    Raises:
        NotImplementedError: a tensor has a tangent, or torch.func differentiates by it.
    """
    given = [x for x in tensors if isinstance(x, Tensor)]
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in given
    ):
        raise NotImplementedError(_FORWARD_MODE.format("attention"))
    if torch._C._are_functorch_transforms_active() and any(x.requires_grad for x in given):
        raise NotImplementedError(_TRANSFORM.format("attention"))
