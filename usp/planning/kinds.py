"""What counts as a number, a flag or a tensor where one is asked for.

No bool is a number, no float an integer, and no tensor whose data lie elsewhere is one that
kernels and messages can take.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any, cast

import torch
from torch import Tensor

# Of the inputs of kernels.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def integer(name: str, value: Any, least: int | None = None) -> int:
    """``value`` as an int: Python's, numpy's or a symbolic one of ``torch.compile``.

    Args:
        name: What it is called in errors.
        value: What the caller gave.
        least: The smallest that is allowed.

    Raises:
        TypeError: it is no integer; a bool and a float with an integral value are none.
        ValueError: it is below ``least``.
    """
    if isinstance(value, torch.SymInt):
        return cast(int, value)
    found: int | None = None
    if not isinstance(value, bool) and not (
        isinstance(value, Tensor) and (value.dim() or value.dtype == torch.bool)
    ):
        try:
            found = operator.index(value)
        except TypeError:
            found = None
    if found is None:
        raise TypeError(f"{name} must be an integer, got {_described(value)}")
    if least is not None and found < least:
        raise ValueError(f"{name} must be {least} or more, got {found}")
    return found


def graph_integer(name: str, value: Any) -> int:
    """The same, and a number that a graph of ``torch.compile`` may make a symbol stays one.

    To look at it would make it a constant of the graph, and another one another graph.
    """
    return value if type(value) is int else integer(name, value)


def real(name: str, value: Any) -> float:
    """``value`` as a finite float: Python's, numpy's, a tensor of one element, integers too.

    Raises:
        TypeError: it is no number; a bool is none.
        ValueError: it is not finite.
    """
    if isinstance(value, torch.SymFloat | torch.SymInt):
        return cast(float, value)
    if isinstance(value, Tensor) and not value.dim() and value.is_floating_point():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {_described(value)}")
    found = float(value)
    if not math.isfinite(found):
        raise ValueError(f"{name} must be finite, got {found}")
    return found


def flag(name: str, value: Any) -> bool:
    """``value`` itself if it is True or False (numpy's too).

    Raises:
        TypeError: it is something else: 1, None and "yes" are.
    """
    kind = type(value)
    if kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {_described(value)}")


def check_kinds(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what no kernel of ours takes together.

    Raises:
        TypeError, NotImplementedError: as ``tensor``.
        ValueError: one has not four dims or no dtype of ours, or dtypes or devices
            differ; names both.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        tensor(name, x)
        if x.dim() != 4:
            raise ValueError(
                f"{name} must be (batch, sequence, heads, head_dim), got shape {tuple(x.shape)}"
            )
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be fp16, bf16, fp32 or fp64, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"q, k and v must share dtype and device: q is {q.dtype} on {q.device}, "
                f"{name} is {x.dtype} on {x.device}"
            )


def tensor(name: str, value: Any) -> Tensor:
    """``value`` itself if it is a tensor whose elements lie in its own memory.

    Raises:
        TypeError: it is no tensor.
        NotImplementedError: it is nested, sparse, quantized, distributed or of another class
            that computes by itself; says what to pass instead.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {_described(value)}")
    kind = type(value).__name__
    if value.is_nested:
        raise NotImplementedError(
            f"{name} is a NestedTensor ({value.layout}): pass a padded one with key_padding_mask, "
            "or the samples packed one behind the other with cu_seqlens"
        )
    if kind == "DTensor":
        raise NotImplementedError(
            f"{name} is a DTensor: pass this rank's shard of the sequence, x.to_local()"
        )
    if value.layout != torch.strided:
        raise NotImplementedError(f"{name} is sparse ({value.layout}): pass x.to_dense()")
    if value.is_quantized:
        raise NotImplementedError(f"{name} is quantized ({value.dtype}): pass x.dequantize()")
    dispatch = type(value).__torch_dispatch__
    if dispatch is not Tensor.__torch_dispatch__ and kind not in _STANDING_IN:
        raise NotImplementedError(
            f"{name} is a {type(value).__module__}.{kind}, whose data lie behind its own "
            "__torch_dispatch__: pass the plain tensor inside"
        )
    return value


def is_fake(value: Any) -> bool:
    """Whether it is a tensor that has a shape and no values."""
    return isinstance(value, Tensor) and (value.is_meta or type(value).__name__ == "FakeTensor")


def device_type(x: Tensor) -> str:
    """In words; ranks whose tensors have no values have others than those whose have."""
    return f"{x.device.type}, without values" if is_fake(x) else x.device.type


# Classes of torch that stand for a plain tensor while it is traced or on its way.
_STANDING_IN = ("FakeTensor", "FunctionalTensor", "AsyncCollectiveTensor", "ProxyTensor")


def _described(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{text} ({type(value).__name__})"
