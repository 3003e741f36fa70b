"""Into the heads of an attention module and out of them again.

Shape letters: N batch, L tokens, H heads, D head dim, E embedding.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usp.nn.multihead.arguments import ArgumentError, Arguments


def project(module: nn.MultiheadAttention, arguments: Arguments) -> tuple[Tensor, ...]:
    """Query, key and value, (N, L, H, D) each.

    Raises:
        ArgumentError: inputs and parameters do not go together; says what to do.
        NotImplementedError: a parameter is spread over ranks itself.
    """
    _check_parameters(module, arguments)
    found = _projections(module, arguments)
    if not arguments.is_batched:
        return tuple(x[None] for x in found)
    return found if module.batch_first else tuple(x.transpose(0, 1) for x in found)


def join_heads(module: nn.MultiheadAttention, out: Tensor, arguments: Arguments) -> Tensor:
    """(N, L, H, D) -> the output in the order of the query's dims."""
    out = out.flatten(2)
    if not arguments.is_batched:
        out = out[0]
    elif not module.batch_first:
        out = out.transpose(0, 1)
    return cast(Tensor, module.out_proj(out))


def _check_parameters(module: nn.MultiheadAttention, arguments: Arguments) -> None:
    for name, parameter in module._parameters.items():
        if type(parameter).__name__ == "DTensor":
            raise NotImplementedError(
                f"{name} is a DTensor, and usp spreads the sequence, not the projections: leave "
                "attention out of tensor parallelism, or let fully_shard gather its parameters "
                "(call the module that was wrapped, not one inside it)"
            )
    packed = cast("Tensor | None", module.in_proj_weight)
    dtype = (module.q_proj_weight if packed is None else packed).dtype
    for name, x in arguments.named_inputs:
        if not x.is_floating_point():
            raise ArgumentError(f"{name} must be floating point, got dtype {x.dtype}")
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ArgumentError(
                f"{name} has dtype {x.dtype}, the parameters have {dtype}: cast one of them "
                "(module.to(dtype)), or call under torch.autocast"
            )


def _projections(module: nn.MultiheadAttention, arguments: Arguments) -> tuple[Tensor, ...]:
    """Query, key and value in heads, in the order of their dims; one product where they are one."""
    x = arguments.query, arguments.key, arguments.value
    biases: tuple[Tensor | None, ...] = (None, None, None)
    packed = cast("Tensor | None", module.in_proj_weight)
    weights: tuple[Tensor, ...]
    if packed is None:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    elif arguments.is_one:
        return _heads(module, F.linear(x[0], packed, module.in_proj_bias), 3).unbind(-3)
    else:
        weights = packed.chunk(3)
    if module.in_proj_bias is not None:
        biases = module.in_proj_bias.chunk(3)
    return tuple(_heads(module, F.linear(*i)) for i in zip(x, weights, biases, strict=True))


def _heads(module: nn.MultiheadAttention, x: Tensor, *parts: int) -> Tensor:
    """(..., E) -> (..., H, D), and of so many parts (..., parts, H, D)."""
    return x.view(*x.shape[:-1], *parts, module.num_heads, module.head_dim)
