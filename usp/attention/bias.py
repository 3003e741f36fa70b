"""Bring an additive bias to where its scores are computed, and its gradient back.

A rank holds ``(B|1, H|1, local queries|1, all keys)``. After the head exchange it computes its
own heads for all queries of its row: rows of a bias are exchanged like queries, a bias that is
the same for every query is only cut into heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from usp.attention.ulysses import gather_heads, scatter_heads
from usp.distributed.comm import Axis
from usp.planning.heads import Cut, Heads


@dataclass(frozen=True)
class BiasCut:
    """How a bias changes hands.

    Attributes:
        lengths: Queries of each rank of the row.
        heads: Query heads of each rank of the row.
        has_rows, has_heads: Whether the bias differs among queries, among heads.
    """

    lengths: tuple[int, ...]
    heads: tuple[Heads, ...]
    has_rows: bool
    has_heads: bool

    @property
    def _cut(self) -> Cut:
        """A bias without heads goes whole to every rank: one "head" each."""
        if not self.has_heads:
            return Cut.one_for_each(self.lengths)
        return Cut.of_query_heads(self.lengths, self.heads)


def agree_on_bias_rows(axis: Axis, bias: Tensor, lengths: tuple[int, ...]) -> bool:
    """Whether a bias differs among queries; a collective of the row where a shape leaves it open.

    A rank with a single query cannot tell a row of its own from a row for everybody.
    """
    mine = lengths[axis.rank]
    if axis.size > 1 and 1 in lengths and any(length != 1 for length in lengths):
        told = bias.shape[2] != 1 if mine != 1 else None
        return True in axis.gather_objects(told)
    return bias.shape[2] != 1 or mine == 1


def scatter_bias(axis: Axis, bias: Tensor, cut: BiasCut) -> Tensor:
    """(B|1, H|1, local queries|1, Sk) -> (B|1, own heads|1, queries of the row|1, Sk)."""
    if axis.size == 1:
        return bias
    if cut.has_rows:
        rows = bias.transpose(1, 2)
        if not cut.has_heads:
            rows = rows.expand(-1, -1, axis.size, -1)
        return scatter_heads(axis, [rows], [cut._cut])[0].transpose(1, 2)
    if not cut.has_heads:
        return bias
    mine = cut.heads[axis.rank]
    return bias[:, mine.offset : mine.offset + mine.count]


def gather_bias_gradient(axis: Axis, dbias: Tensor, cut: BiasCut) -> Tensor:
    """The way back: this rank's part of the gradient, in the shape of its bias."""
    if axis.size == 1:
        return dbias
    if cut.has_rows:
        rows = gather_heads(axis, [dbias.transpose(1, 2)], [cut._cut])[0].transpose(1, 2)
        return rows if cut.has_heads else rows.sum(1, keepdim=True)
    if not cut.has_heads:
        return dbias
    mine = cut.heads[axis.rank]
    after = mine.total - mine.offset - mine.count
    return torch.nn.functional.pad(dbias, (0, 0, 0, 0, mine.offset, after))
