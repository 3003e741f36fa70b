"""Where queries and keys lie: each rank its own, or all of one side on every rank."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from usp.attention.given import Options, Tensors
from usp.planning.layout import Layout, Replicated

PLACEMENTS = "sharded", "replicated"


def with_placement(tensors: Tensors, options: Options) -> Options:
    """A side that every rank holds whole has a layout of its own, which says how long it is."""
    wanted = options.queries, options.keys
    if "replicated" not in wanted or refusal(options) is not None:
        return options  # as it is, or refused later, on all ranks
    given = options.layout if isinstance(options.layout, tuple) else (options.layout,) * 2
    if len(given) != 2 or not all(_is_sequence(x) for x in (tensors.q, tensors.k)):
        return options
    lengths = tensors.q.shape[1], tensors.k.shape[1]
    layouts: list[Layout] = [
        Replicated(int(length)) if place == "replicated" else layout
        for place, layout, length in zip(wanted, given, lengths, strict=True)
    ]
    return replace(options, layout=(layouts[0], layouts[1]), queries="sharded", keys="sharded")


def _is_sequence(x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4


def refusal(options: Options) -> str | None:
    """Why there are no such placements; None where there are."""
    for name, place in (("queries", options.queries), ("keys", options.keys)):
        if place not in PLACEMENTS:
            return f"{name} must be one of {', '.join(map(repr, PLACEMENTS))}, got {place!r}"
    if options.queries == options.keys == "replicated":
        return (
            "queries and keys are both replicated, and nothing is left to share: leave the mesh "
            "out (mesh=None)"
        )
    return None


def refuse_placement(tensors: Tensors, options: Options) -> None:
    """Raise where sides are placed as nobody can compute them.

    Raises:
        ValueError: a placement is unknown, or both sides are replicated.
        NotImplementedError: an additive bias of queries that are replicated.
    """
    reason = refusal(options)
    if reason is not None:
        raise ValueError(reason)
    layouts = options.layout if isinstance(options.layout, tuple) else (options.layout,)
    if isinstance(layouts[0], Replicated) and tensors.attn_bias is not None:
        raise NotImplementedError(
            "queries='replicated' merges what each rank finds for all of them, which an attn_bias "
            "has no part in: give a mask of usp.masks, or cut the queries (queries='sharded')"
        )
