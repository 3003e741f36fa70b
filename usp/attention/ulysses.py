"""The head exchange: all heads of my tokens against my heads of all tokens of the row.

Uneven lengths and heads move without a byte of padding: the messages are exactly the tokens and
heads that change hands. A rank gets the key heads that its query heads read, so a key head may
go to several ranks; their gradients are summed where they come home.

Source: DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise

from torch import Tensor

from usp.distributed.comm import Axis
from usp.ops.pack import pack, unpack
from usp.planning.heads import Cut


def scatter_heads(axis: Axis, tensors: Sequence[Tensor], cuts: Sequence[Cut]) -> list[Tensor]:
    """Give every rank its heads, get all tokens of the own ones; one message for all tensors.

    Args:
        axis: The row.
        tensors: (B, L, H, X) each, all heads of this rank's tokens.
        cuts: One for each tensor.

    Returns:
        (B, sum of lengths, own heads, X) each.
    """
    outgoing = [
        [t[:, :, slice(*cut.heads[rank])] for t, cut in zip(tensors, cuts, strict=True)]
        for rank in range(axis.size)
    ]
    wholes = [
        t.new_empty((t.shape[0], sum(cut.lengths), _count(cut.heads[axis.rank]), t.shape[3]))
        for t, cut in zip(tensors, cuts, strict=True)
    ]
    split = [whole.split(cut.lengths, 1) for whole, cut in zip(wholes, cuts, strict=True)]
    _exchange(axis, outgoing, [[parts[rank] for parts in split] for rank in range(axis.size)])
    return wholes


def gather_heads(axis: Axis, tensors: Sequence[Tensor], cuts: Sequence[Cut]) -> list[Tensor]:
    """The way back, the adjoint of ``scatter_heads``: heads that several ranks held are summed.

    Args:
        axis: The row.
        tensors: (B, sum of lengths, own heads, X) each.
        cuts: One for each tensor, as in ``scatter_heads``.

    Returns:
        (B, L, H, X) each.
    """
    places = [
        _places_of_heads(t, cut.lengths[axis.rank], cut.heads)
        for t, cut in zip(tensors, cuts, strict=True)
    ]
    send_tokens(axis, tensors, cuts, [parts for _, parts in places])
    for (whole, parts), cut in zip(places, cuts, strict=True):
        if _overlap(cut.heads):
            whole.zero_()
            for part, run in zip(parts, cut.heads, strict=True):
                whole[:, :, slice(*run)] += part
    return [whole for whole, _ in places]


def send_tokens(
    axis: Axis,
    tensors: Sequence[Tensor],
    cuts: Sequence[Cut],
    places: Sequence[Sequence[Tensor]],
) -> None:
    """Give every rank its tokens; one message for all tensors.

    Args:
        axis, tensors, cuts: As in ``gather_heads``.
        places: Of each tensor, where the heads of each rank go, (B, L, its heads, X).
    """
    split = [t.split(cut.lengths, 1) for t, cut in zip(tensors, cuts, strict=True)]
    ranks = range(axis.size)
    outgoing, incoming = ([[parts[r] for parts in each] for r in ranks] for each in (split, places))
    _exchange(axis, outgoing, incoming)


def _exchange(
    axis: Axis, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Tensor]]
) -> None:
    """Send ``outgoing[rank]`` to each rank, receive ``incoming[rank]`` in place from each."""
    send, recv = ([sum(t.nbytes for t in row) for row in rows] for rows in (outgoing, incoming))
    received = axis.all_to_all(pack(list(chain(*outgoing))), send, recv)
    unpack(received, list(chain(*incoming)))


def _places_of_heads(
    like: Tensor, length: int, heads: Sequence[tuple[int, int]]
) -> tuple[Tensor, list[Tensor]]:
    """Room for all heads of ``length`` tokens, and for what comes from each rank.

    The second are parts of the first, unless heads come from several ranks, to be summed.
    """
    batch, _, _, width = like.shape
    whole = like.new_empty((batch, length, max(stop for _, stop in heads), width))
    if _overlap(heads):
        return whole, [like.new_empty((batch, length, _count(run), width)) for run in heads]
    return whole, [whole[:, :, slice(*run)] for run in heads]


def _overlap(heads: Sequence[tuple[int, int]]) -> bool:
    return any(a[1] != b[0] for a, b in pairwise(heads))


def _count(heads: tuple[int, int]) -> int:
    return heads[1] - heads[0]
