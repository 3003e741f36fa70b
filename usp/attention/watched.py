"""Who has to see attention whole, and so sees one op."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from usp.attention.given import Options, Tensors
from usp.distributed.agreement import When, meet_without_values
from usp.distributed.mesh import SequenceMesh, check_mesh
from usp.planning.kinds import is_fake, tensor

Attention = Callable[
    [Tensors, Options, SequenceMesh | None, "int | Tensor | None", When],
    "Tensor | tuple[Tensor, Tensor]",
]


def is_eager() -> bool:
    """Whether nobody but autograd sees what is done."""
    return not (torch.compiler.is_compiling() or torch._C._is_tracing() or _is_seen())


def is_watched() -> bool:
    """Whether somebody keeps, replaces or repeats the operations that he sees."""
    if torch._C._is_tracing():
        raise NotImplementedError("torch.jit.trace cannot follow attention: use torch.export")
    return _is_seen()


def _is_seen() -> bool:
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


def seen_whole(
    op: Attention,
    tensors: Tensors,
    options: Options,
    mesh: SequenceMesh | None,
    dropout_seed: int | Tensor | None,
    validate: When,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """Attention through an op where somebody has to see it whole; None where nobody has.

    Args:
        op: What calls it.
        tensors, options, mesh, dropout_seed, validate: Of ``attend``.
    """
    if torch.compiler.is_compiling():
        for name, x in zip(Tensors._fields, tensors, strict=True):
            if x is not None:
                tensor(name, x)
        mesh = check_mesh(mesh)
        several = mesh is not None and mesh.size > 1
        return op(tensors, options, mesh if several else None, dropout_seed, validate)
    if is_fake(tensors.q):
        meet_without_values(check_mesh(mesh), validate)
        with getattr(tensors.q, "fake_mode", nullcontext()):
            return op(tensors, options, mesh, dropout_seed, validate)
    return op(tensors, options, mesh, dropout_seed, validate) if is_watched() else None
