"""Numbers that may be learned: the factor of the scores can, as part of the queries."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from usp.attention.given import Options, Tensors
from usp.planning.problem import state_dtype


def with_learned_scale(tensors: Tensors, options: Options) -> tuple[Tensors, Options]:
    """A ``softmax_scale`` that is a tensor becomes a factor of q, through which it has a gradient.

    The product is taken in the dtype of the state and rounded once to that of q.

    Raises:
        TypeError: another number is a tensor with a gradient, or the scale is no single number.
    """
    for name in ("softcap", "dropout_p"):
        refuse_gradient(name, getattr(options, name))
    scale, q = options.softmax_scale, tensors.q
    if not isinstance(scale, Tensor) or not hasattr(q, "dtype"):  # checked later
        return tensors, options
    if scale.numel() != 1 or (scale.is_meta and not q.is_meta):
        raise TypeError(
            f"softmax_scale must be one number, got a tensor of shape {tuple(scale.shape)} on "
            f"{scale.device}: multiply q by a scale for each head"
        )
    dtype = state_dtype(q.dtype)
    scaled = q.to(dtype) * scale.reshape(()).to(q.device, dtype)
    return tensors._replace(q=scaled.to(q.dtype)), replace(options, softmax_scale=1.0)


def refuse_gradient(name: str, value: object) -> None:
    """Raise a TypeError where a number is a tensor whose gradient would be lost."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name} has no gradient here: pass a number, {name}.item()")
