"""Cut a sequence into this rank's tokens and join it again; both differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from usp.distributed.comm import untraced
from usp.distributed.mesh import SequenceMesh, check_mesh
from usp.planning.kinds import is_fake
from usp.planning.layout import Layout, check_layout
from usp.planning.shares import named_lengths
from usp.sharding.positions import positions
from usp.sharding.unshard import unshard, unshard_in_graph
from usp.sharding.whole import checked_dim


def shard_sequence(
    x: Tensor, mesh: SequenceMesh | None, dim: int, layout: Layout = "contiguous"
) -> Tensor:
    """This rank's tokens of a sequence that every rank holds whole.

    Lengths that do not divide are cut unevenly, never padded. The gradient is this rank's part:
    zero at the tokens of other ranks.

    Args:
        x: (..., seq_len, ...), the same on every rank.
        mesh: The ranks that share the sequence; None is one device.
        dim: The sequence dim.
        layout: Which token goes where.

    Returns:
        (..., local tokens, ...), contiguous.
    """
    dim = checked_dim(x, dim)
    index = positions(x.shape[dim], mesh, layout, x.device)
    return x.index_select(dim, index)


def unshard_sequence(
    x: Tensor,
    mesh: SequenceMesh | None,
    dim: int,
    layout: Layout = "contiguous",
    seq_len: int | None = None,
    *,
    validate: bool | None = True,
) -> Tensor:
    """The whole sequence on every rank, in global order.

    The gradient is the adjoint: the sum of what every rank's whole sequence got. So the loss of
    the whole is the sum over ranks; a loss that all ranks compute alike is divided by
    ``mesh.size`` first.

    Args:
        x: (..., local tokens, ...).
        mesh: The ranks that share the sequence; None is one device.
        dim: The sequence dim.
        layout: As the sequence was cut.
        seq_len: Tokens of the whole; by default the sum of what the ranks hold.
        validate: Compare what all ranks hold first, so that a disagreement raises on every rank
            instead of hanging: 48 bytes along each axis of the mesh, for which a GPU is waited
            unless the ranks can talk on the host. False where all are known to fit, in a loop
            that must not wait and passes ``seq_len``, which is asked for otherwise. None: on CPUs
            always, elsewhere where a length must be asked for.

    Raises:
        ValueError: this rank's share of ``seq_len`` is not what ``x`` holds, or (``validate``)
            another rank refuses or holds something else; names both.
    """
    if mesh is None:
        checked_dim(x, dim)
        return x
    if (torch.compiler.is_compiling() or is_fake(x)) and check_mesh(mesh) is not None:
        dim, named = checked_dim(x, dim), named_lengths(seq_len, check_layout(layout))
        if named is not None:
            return unshard_in_graph(x, mesh, dim, layout, named[0], validate)
    return untraced(unshard)(x, mesh, dim, layout, seq_len, validate)
