"""In how many pieces a call is worked off, and where what waits does."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from usp.attention.given import Options, Tensors
from usp.ops.waiting import OFFLOADS
from usp.planning.kinds import integer, is_fake
from usp.planning.layout import Replicated


def in_chunks(options: Options) -> bool:
    """Whether, rightly or wrongly, a call asks for pieces or for another place."""
    numbers = options.chunks, options.head_chunks  # whatever these are
    return options.offload is not None or any(type(n) is not int or n != 1 for n in numbers)


def refuse_graphs(tensors: Tensors) -> None:
    """Refuse a graph that is being made of what is no op; ``torch.compile`` breaks its own.

    Raises:
        NotImplementedError: says what is in the way.
    """
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []
    if (
        torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or any(getattr(mode, "_mode_key", None) is not None for mode in modes)
        or is_fake(tensors.q)
    ):
        raise NotImplementedError(
            "chunks, head_chunks and offload are for eager calls and torch.compile, which breaks "
            "its graph there: leave them out under torch.export, torch.func and fake tensors"
        )


def refuse_chunks(options: Options) -> None:
    """Refuse pieces that there cannot be.

    Raises:
        TypeError: a number of them is no integer.
        ValueError: it is below 1, or ``offload`` is an unknown word.
        NotImplementedError: queries move, or lie on every rank.
    """
    integer("chunks", options.chunks, least=1)
    integer("head_chunks", options.head_chunks, least=1)
    if options.offload not in OFFLOADS:
        known = ", ".join(map(repr, OFFLOADS))
        raise ValueError(f"offload must be one of {known}, got {options.offload!r}")
    if not in_chunks(options):
        return
    asked = (
        f"chunks={options.chunks}, head_chunks={options.head_chunks}, offload={options.offload!r}"
    )
    if options.transport in ("queries", "query_ring", "grid"):
        raise NotImplementedError(
            f"{asked}: it is keys that come in chunks, but with transport={options.transport!r} "
            "queries move: leave transport='auto'"
        )
    layouts = options.layout if isinstance(options.layout, tuple) else (options.layout,)
    if isinstance(layouts[0], Replicated):
        raise NotImplementedError(
            f"{asked}: queries='replicated' is for few queries, which are computed at once: leave "
            "these out, or cut the queries (queries='sharded')"
        )
