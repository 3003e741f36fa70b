"""Our arithmetic in the dtypes it was given, whatever autocast the caller is in.

``torch.autocast`` rounds the inputs of matrix products wherever it is on, also inside a function
that has chosen fp32 for them, and in a backward by where *that* is called. The inputs of attention
are cast once, at its door; below it nothing is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor


def as_given(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast switched off for tensors of a device; nothing where it is not on."""
    if not torch._C._is_any_autocast_enabled():
        return nullcontext()
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def in_autocast(x: Tensor) -> Tensor:
    """The tensor in autocast's dtype where it is on, as torch's own attention does."""
    if not isinstance(x, Tensor) or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


def einsum(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """``torch.einsum`` of two tensors in their own dtype, and so its gradients.

    Args:
        equation: Each index stands in two of a, b and the result at least, once in each.
    """
    return cast(Tensor, _Einsum.apply(equation, a, b))


class _Einsum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, equation: str, a: Tensor, b: Tensor) -> Tensor:
        ctx.equation = equation
        ctx.save_for_backward(a, b)
        with as_given(a.device):
            return torch.einsum(equation, a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        inputs, of_result = ctx.equation.split("->")
        of_a, of_b = inputs.split(",")
        da = db = None
        if ctx.needs_input_grad[1]:
            da = einsum(f"{of_result},{of_b}->{of_a}", grad, b)
        if ctx.needs_input_grad[2]:
            db = einsum(f"{of_result},{of_a}->{of_b}", grad, a)
        return None, da, db
