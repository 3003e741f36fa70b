"""What counts as a number where one is asked for: no bool, and no float for an integer."""

from __future__ import annotations

import math
import operator
from typing import Any, cast

import torch


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
        isinstance(value, torch.Tensor) and (value.dim() or value.dtype == torch.bool)
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


def real(name: str, value: Any) -> float:
    """``value`` as a finite float: Python's or numpy's, integers too.

    Raises:
        TypeError: it is no number; a bool is none.
        ValueError: it is not finite.
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
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


def _described(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"
