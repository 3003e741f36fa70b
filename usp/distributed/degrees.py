"""The degrees of a mesh: as given, or as the planner chooses."""

from __future__ import annotations

from typing import Any

import torch

from usp.planning.choose.auto import Attention, choose_degrees
from usp.planning.kinds import integer


def checked_degrees(
    given: tuple[Any, int | None], ranks: int, attention: Attention, kind: str
) -> tuple[int, int]:
    """Those that were given, or that the planner chooses."""
    ulysses_degree, ring_degree = given
    if ulysses_degree == "auto":
        if ring_degree is not None:
            raise TypeError(f'init_mesh("auto") chooses ring_degree too, got {ring_degree!r}')
        name = "cpu" if kind == "cpu" else getattr(torch, kind).get_device_name()
        return choose_degrees(ranks, attention, name)
    if attention:
        raise TypeError(
            f'{", ".join(attention)}: for init_mesh("auto", ...) alone, got ulysses_degree '
            f"{ulysses_degree!r}"
        )
    if ring_degree is None:
        raise TypeError('ring_degree must be an integer, got None; init_mesh("auto", ...) has none')
    return _making_up(ulysses_degree, ring_degree, ranks)


def _making_up(ulysses_degree: int, ring_degree: int, ranks: int) -> tuple[int, int]:
    ulysses_degree = integer("ulysses_degree", ulysses_degree, least=1)
    ring_degree = integer("ring_degree", ring_degree, least=1)
    if ulysses_degree * ring_degree != ranks:
        raise ValueError(
            f"ulysses_degree {ulysses_degree} x ring_degree {ring_degree} is "
            f"{ulysses_degree * ring_degree} ranks, but the group has {ranks}: change a degree, "
            "pass group=, or build a larger DeviceMesh and use SequenceMesh.from_device_mesh"
        )
    return ulysses_degree, ring_degree


def checked_outer(ring_outer_degree: int, ring_degree: int) -> int:
    ring_outer_degree = integer("ring_outer_degree", ring_outer_degree, least=1)
    if ring_degree % ring_outer_degree:
        raise ValueError(
            f"ring_outer_degree {ring_outer_degree} does not divide ring_degree {ring_degree}: "
            "every node of a double ring has as many of its ranks"
        )
    return ring_outer_degree
