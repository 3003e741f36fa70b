"""Which modules of a model are MLPs, and what stands in their place where they compute in tiles."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from usp.integrations._boundary import Boundary
from usp.integrations._choice import any_means, outermost, shortened
from usp.nn.tiled.module import Tiled


def tiled_sites(
    names: Mapping[str, nn.Module], meant: list[str], tiles: int, dim: int = -2
) -> list[Tiled]:
    """What will stand in the place of MLPs, each once.

    Raises:
        ValueError, NotImplementedError: As ``replace_mlp``.
    """
    found = {names[name]: name for name in reversed(meant)}
    if twice := [name for module, name in found.items() if in_tiles(module)]:
        raise ValueError(
            f"{shortened(twice)} compute in tiles already: usp.restore(model) first, which undoes "
            "usp.parallelize, too"
        )
    return [Tiled(module, name, tiles, dim) for module, name in reversed(found.items())]


def of_trunk(
    boundary: Boundary, blocks: Mapping[str, nn.Module], names: Mapping[str, nn.Module]
) -> list[str]:
    """Names of the MLPs of a trunk.

    Raises:
        ValueError: it is not known which, or none is.
    """
    inside = [
        name
        for prefix, block in blocks.items()
        for name, _ in block.named_modules(prefix=prefix)
        if any_means(boundary.mlp, name, names)
    ]
    if not inside:
        raise ValueError(
            f"no module of {boundary.trunk} is known to be an MLP that returns one tensor: say "
            "which are, usp.Boundary(trunk, mlp=...) or usp.replace_mlp(model, tiles, only=...)"
        )
    return outermost(inside)


def in_tiles(module: nn.Module) -> bool:
    """Whether it computes in tiles, whatever else stands in the place of its forward."""
    site = module.__dict__.get("forward")
    while site is not None and not isinstance(site, Tiled):
        site = getattr(site, "_own", None)
    return site is not None
