"""A loss for models that return none: the product of what they return with drawn numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from usp.distributed.mesh import SequenceMesh
from usp.planning.layout import Layout
from usp.verification.join import Places, index_of
from usp.verification.record import tensors


@dataclass(frozen=True)
class OnRank:
    """Whose outputs they are.

    Attributes:
        mesh, layout: Who holds which tokens.
        shapes: Of what the whole model returns.
        factor: Of what every rank computes alike, so that the sum over the ranks is the loss.
    """

    mesh: SequenceMesh
    layout: Layout
    shapes: Sequence[tuple[int, ...]]
    factor: float


def drawn(out: Any, place: OnRank | None = None) -> Tensor | None:
    """The product, of the whole or of this rank's part; None where no output has a gradient.

    Args:
        out: What the model returned.
        place: None is one device. The ranks tell each other what shapes they have.
    """
    leaves = tensors(out)
    own = [tuple(x.shape) for x in leaves]
    everyone = [own] if place is None else place.mesh.gather_objects(own)
    terms = []
    for n, x in enumerate(leaves):
        if not x.requires_grad:
            continue
        shape = own[n] if place is None or n >= len(place.shapes) else place.shapes[n]
        random = torch.Generator().manual_seed(n)
        whole = torch.randn(shape, generator=random, dtype=torch.float64).to(x)
        if place is None:
            terms.append((x * whole).sum())
        else:
            terms.append(_part(x, whole, [shapes[n : n + 1] for shapes in everyone], place))
    return sum(terms[1:], terms[0]) if terms else None


def _part(
    x: Tensor, whole: Tensor, everyone: Sequence[Sequence[tuple[int, ...]]], place: OnRank
) -> Tensor:
    """Zero where it is neither the whole nor a share of it, which the shapes will say."""
    shapes = [shape for shapes in everyone for shape in shapes]
    mesh, size = place.mesh, tuple(whole.shape)
    if all(shape == size for shape in shapes):
        return (x * whole).sum() * place.factor
    places = Places((mesh.ring_degree, mesh.ulysses_degree), place.layout)
    found = index_of(size, shapes, mesh.rank, places) if len(shapes) == mesh.size else None
    if found is None:
        return x.sum() * 0.0
    dim, index = found
    return (x * whole.index_select(dim, index)).sum()
