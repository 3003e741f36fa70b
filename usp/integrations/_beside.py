"""What modules of a trunk are given beside their tokens, with an entry for each of these."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from usp.integrations._answer import Tokens, refuse
from usp.integrations._boundary import Boundary


def cut_beside(tokens: Tokens, boundary: Boundary, name: str, whole: Any) -> Any:
    """An argument as this rank's tokens need it: their entries, where it has one for each.

    Raises:
        ValueError: it has not; names both numbers.
    """
    if name not in boundary.beside or whole is None:
        return whole
    if isinstance(whole, tuple | list):
        return type(whole)(cut_beside(tokens, boundary, name, item) for item in whole)
    dim, length = boundary.beside[name], tokens.spread.seq_len
    entries = whole.shape[dim]
    if tokens.cut and entries == tokens.held:
        return whole
    if entries == length and not tokens.cut:
        return tokens.spread.shard(whole, dim)
    if entries < length and not tokens.cut and name in boundary.after_prefix:
        return _of_the_others(tokens, whole, dim)
    refusal = f"{name} is {tuple(whole.shape)} with {entries} entries along dim {dim}"
    refuse(
        tokens.spread,
        ValueError(f"{refusal} for {length} tokens: beside= says that it has one for each"),
    )


def _of_the_others(tokens: Tokens, whole: Tensor, dim: int) -> Tensor:
    """Entries for this rank's tokens but for those of the prefix, which stand first on each rank,
    for all hold theirs in their order."""
    dim %= whole.dim()
    prefix = tokens.spread.seq_len - whole.shape[dim]
    behind = 2 * (whole.dim() - dim - 1)
    held = tokens.spread.shard(pad(whole, (*[0] * behind, prefix, 0)), dim)
    first = tokens.count_first(prefix)
    return held.narrow(dim, first, tokens.held - first)
