"""Boundaries of the parts of a sequence, as host integers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor

from usp.planning.kinds import integer


def check_cu_seqlens(
    cu_seqlens: Sequence[int] | Tensor, name: str = "cu_seqlens"
) -> tuple[int, ...]:
    """Document boundaries as a tuple: ``(0, ..., total)``, non-decreasing.

    Raises:
        ValueError: fewer than two boundaries, a first one that is not 0, or a decreasing pair;
            names the values.
    """
    if isinstance(cu_seqlens, Tensor):
        cu_seqlens = host_boundaries(cu_seqlens, name).tolist()
    elif not isinstance(cu_seqlens, Iterable):
        raise TypeError(f"{name} must be host integers (0, ..., total), got {cu_seqlens!r}")
    bounds = tuple(integer(f"a boundary of {name}", bound) for bound in cu_seqlens)
    if len(bounds) < 2 or bounds[0] != 0:
        raise ValueError(
            f"{name} must be (0, ..., total) with at least two boundaries, got {len(bounds)} "
            f"starting with {bounds[:1]}"
        )
    for i, (a, b) in enumerate(pairwise(bounds)):
        if b < a:
            raise ValueError(f"{name} must not decrease, but [{i}]={a} and [{i + 1}]={b}")
    return bounds


def host_boundaries(cu_seqlens: Tensor, name: str = "cu_seqlens") -> Tensor:
    """``cu_seqlens`` itself, whatever its values are.

    Raises:
        ValueError: it is no list of numbers on the host.
    """
    if cu_seqlens.device.type != "cpu":
        raise ValueError(
            f"{name} must be host integers (a tuple or a CPU tensor), got a tensor on "
            f"{cu_seqlens.device}: planning must not wait for the device"
        )
    if cu_seqlens.dim() != 1:
        raise ValueError(f"{name} must have one dim, got shape {tuple(cu_seqlens.shape)}")
    return cu_seqlens
