"""Which tokens are this rank's, and as an op for who must see it whole.

Tables of positions are made at a first call and found by later ones, so that no graph and no mode
may see how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from usp.distributed.mesh import SequenceMesh, degrees_and_place, mesh_of
from usp.planning.kinds import integer
from usp.planning.layout import Layout, check_layout, from_told, told
from usp.planning.shares import local_positions, shares

_LIBRARY = torch.library.Library("usp", "FRAGMENT")


def positions(
    seq_len: int,
    mesh: SequenceMesh | None,
    layout: Layout = "contiguous",
    device: torch.device | str | None = None,
) -> Tensor:
    """Global positions of this rank's tokens, for RoPE and position tables.

    Args:
        seq_len: Tokens of the whole sequence.
        mesh: The ranks that share it; None is one device.
        layout: Which token is where.
        device: Where the result lies; CPU by default.

    Returns:
        (local tokens,) int64, ascending.

    Raises:
        ValueError: the layout is unknown or made for another length.
    """
    (ring, ulysses), rank = degrees_and_place(mesh)
    seq_len = integer("seq_len", seq_len, least=0)
    check_layout(layout)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        given = *told(layout), None if mesh is None else mesh.name
        return cast(Tensor, torch.ops.usp.positions(seq_len, *given).to(device))
    return local_positions(layout, seq_len, ring, ulysses, rank).to(device)


def _positions(
    seq_len: int, layout: str, numbers: Sequence[int] | None, mesh: str | None
) -> Tensor:
    (ring, ulysses), rank = degrees_and_place(None if mesh is None else mesh_of(mesh))
    placed = from_told(layout, numbers)
    return local_positions(placed, seq_len, ring, ulysses, rank).clone()


def _fake_positions(
    seq_len: int, layout: str, numbers: Sequence[int] | None, mesh: str | None
) -> Tensor:
    (ring, ulysses), (r, u) = degrees_and_place(None if mesh is None else mesh_of(mesh))
    placed = from_told(layout, numbers)
    with _disable_current_modes():
        held = shares(placed, int(seq_len), ring, ulysses)[r * ulysses + u]
    return torch.empty(held, dtype=torch.int64, device="cpu")


_LIBRARY.define(
    "positions(SymInt seq_len, str layout, int[]? numbers, str? mesh) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("positions", _positions, "CompositeExplicitAutograd")
torch.library.register_fake("usp::positions", _fake_positions, lib=_LIBRARY)
