"""The head exchange: all heads of my tokens against my heads of all tokens of the row.

Uneven lengths and heads move without a byte of padding: the messages are exactly the tokens and
heads that change hands. A rank gets the key heads that its query heads read, so a key head may
go to several ranks; their gradients are summed where they come home.

Source: DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from usp import kernels
from usp.comm import Axis, Parcel
from usp.layout import pieces
from usp.problem import Heads


@lru_cache(maxsize=256)
def split_heads(num_heads: int, num_kv_heads: int, degree: int) -> tuple[Heads, ...]:
    """The query heads of each rank of a row, as even as they come; possibly none.

    Args:
        num_heads, num_kv_heads: H and G, H a multiple of G.
        degree: Ranks of the row.
    """
    counts = pieces(num_heads, degree)
    group_size = num_heads // num_kv_heads
    return tuple(
        Heads(sum(counts[:rank]), count, num_heads, group_size) for rank, count in enumerate(counts)
    )


def kv_heads_shared(heads: Sequence[Heads]) -> bool:
    """Whether some key head is read on several ranks."""
    held = [rank.kv_range for rank in heads if rank.count]
    return any(later[0] < earlier[1] for earlier, later in pairwise(held))


@dataclass(frozen=True)
class Cut:
    """How one tensor is cut among the ranks of a row.

    Attributes:
        lengths: Tokens of each rank before the exchange.
        heads: First and one past the last head of each rank after it; runs may overlap.
    """

    lengths: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]


def scatter_heads(axis: Axis, tensors: Sequence[Tensor], cuts: Sequence[Cut]) -> list[Tensor]:
    """Give every rank its heads, get all tokens of the own ones; one message for all tensors.

    Args:
        axis: The row.
        tensors: (B, L, H, X) each, all heads of this rank's tokens.
        cuts: One for each tensor.

    Returns:
        (B, sum of lengths, own heads, X) each.
    """
    if axis.size == 1:
        return list(tensors)
    outgoing = [
        [t[:, :, slice(*cut.heads[rank])] for t, cut in zip(tensors, cuts, strict=True)]
        for rank in range(axis.size)
    ]
    incoming: list[list[tuple[int, ...]]] = [
        [
            (t.shape[0], cut.lengths[rank], _count(cut.heads[axis.rank]), t.shape[3])
            for t, cut in zip(tensors, cuts, strict=True)
        ]
        for rank in range(axis.size)
    ]
    received = _exchange(axis, outgoing, incoming)
    return [torch.cat(parts, 1) for parts in zip(*received, strict=True)]


def gather_heads(axis: Axis, tensors: Sequence[Tensor], cuts: Sequence[Cut]) -> list[Tensor]:
    """The way back, the adjoint of ``scatter_heads``: heads that several ranks held are summed.

    Args:
        axis: The row.
        tensors: (B, sum of lengths, own heads, X) each.
        cuts: One for each tensor, as in ``scatter_heads``.

    Returns:
        (B, L, H, X) each.
    """
    if axis.size == 1:
        return list(tensors)
    split = [t.split(cut.lengths, 1) for t, cut in zip(tensors, cuts, strict=True)]
    outgoing = [[parts[rank] for parts in split] for rank in range(axis.size)]
    incoming: list[list[tuple[int, ...]]] = [
        [
            (t.shape[0], cut.lengths[axis.rank], _count(cut.heads[rank]), t.shape[3])
            for t, cut in zip(tensors, cuts, strict=True)
        ]
        for rank in range(axis.size)
    ]
    received = _exchange(axis, outgoing, incoming)
    return [
        _join(parts, cut.heads)
        for parts, cut in zip(zip(*received, strict=True), cuts, strict=True)
    ]


def _exchange(
    axis: Axis, outgoing: list[list[Tensor]], incoming: list[list[tuple[int, ...]]]
) -> list[list[Tensor]]:
    """Send ``outgoing[rank]`` to each rank, receive tensors of the shapes ``incoming[rank]``."""
    sent = [Parcel.of(tensors) for tensors in outgoing]
    come = [Parcel(tuple(shapes), sent[0].dtypes) for shapes in incoming]
    send, recv = [p.nbytes for p in sent], [p.nbytes for p in come]
    message = torch.empty(sum(send), dtype=torch.uint8, device=outgoing[0][0].device)
    _pack(sent, outgoing, message.split(send))
    received = axis.all_to_all(message, send, recv).split(recv)
    return [parcel.unpack(part) for parcel, part in zip(come, received, strict=True)]


def _pack(
    parcels: Sequence[Parcel], outgoing: Sequence[Sequence[Tensor]], messages: Sequence[Tensor]
) -> None:
    """All pieces into their messages: one launch for each tensor where Triton runs."""
    places = [parcel.views(part) for parcel, part in zip(parcels, messages, strict=True)]
    pieces = [piece for tensors in outgoing for piece in tensors]
    if not all(places) or not kernels.can_take(*pieces):
        for parcel, tensors, part in zip(parcels, outgoing, messages, strict=True):
            parcel.pack(tensors, out=part)
        return
    from usp.kernels.head_exchange import copy_pieces

    with kernels.on_device_of(messages[0]):
        by_tensor = (zip(*cut, strict=True) for cut in (outgoing, places))
        for sources, targets in zip(*by_tensor, strict=True):
            copy_pieces(sources, targets)


def _join(parts: Sequence[Tensor], heads: Sequence[tuple[int, int]]) -> Tensor:
    """The heads of all ranks in order; where runs overlap, their sum."""
    if all(a[1] == b[0] for a, b in pairwise(heads)):
        return torch.cat(list(parts), 2)
    batch, length, _, width = parts[0].shape
    out = parts[0].new_zeros((batch, length, max(stop for _, stop in heads), width))
    for part, (first, stop) in zip(parts, heads, strict=True):
        out[:, :, first:stop] += part
    return out


def _count(heads: tuple[int, int]) -> int:
    return heads[1] - heads[0]
