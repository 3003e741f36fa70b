"""A function of chunks, some of them at a time, whose backward computes it again.

What it makes on its way is then held for a few chunks only, and nothing of it is kept between
forward and backward but its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from usp.ops.derivatives import OnceDifferentiable, without_second_derivative
from usp.ops.precision import as_given

Function = Callable[..., tuple[Tensor, ...]]
# Numbers of the largest argument that are taken at a time.
SLAB = 2**20


def in_slabs(function: Function, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``function(*tensors)``, where the i-th chunk of each result needs the i-th of each argument.

    Args:
        tensors: (n, ...) each, with one n.
    """
    if torch.compiler.is_compiling():  # what a graph keeps or computes again is its maker's
        with as_given(tensors[0].device):
            return function(*tensors)
    return cast("tuple[Tensor, ...]", _InSlabs.apply(function, *tensors))


def _slabs(tensors: tuple[Tensor, ...]) -> list[slice]:
    """At least one, also of no chunks."""
    chunks = len(tensors[0])
    each = max(x[:1].numel() for x in tensors)
    count = max(1, SLAB // max(each, 1))
    return [slice(i, i + count) for i in range(0, max(chunks, 1), count)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _InSlabs(OnceDifferentiable):
    of = "linear attention"

    @staticmethod
    def forward(ctx: Any, function: Function, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        with as_given(tensors[0].device):
            found = [function(*(x[slab] for x in tensors)) for slab in _slabs(tensors)]
        return tuple(_joined(list(parts)) for parts in zip(*found, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        parts: list[list[Tensor]] = [[] for _ in tensors]
        for slab in _slabs(tensors):
            given = [
                x[slab].detach().requires_grad_(needs)
                for x, needs in zip(tensors, needed, strict=True)
            ]
            leaves = [x for x in given if x.requires_grad]
            with torch.enable_grad(), as_given(tensors[0].device):
                found = ctx.function(*given)
                # a result that needs none of what is differentiated has no gradient to hand on
                some = [i for i, x in enumerate(found) if x.requires_grad]
                wanted = [gradients[i][slab].detach() for i in some]
                of_leaves = iter(torch.autograd.grad([found[i] for i in some], leaves, wanted))
            for part, needs in zip(parts, needed, strict=True):
                if needs:
                    part.append(next(of_leaves))
        found = [_joined(part) if part else None for part in parts]
        return None, *without_second_derivative(found, [*gradients, *tensors], _InSlabs.of)
