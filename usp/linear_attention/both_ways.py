"""``causal=False``: every token sees the sum over its whole document, which has no order."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from usp.distributed.comm import Axis
from usp.linear_attention.arguments import Request
from usp.linear_attention.states import Meeting
from usp.ops.derivatives import OnceDifferentiable, without_second_derivative
from usp.ops.precision import einsum

Bounds = tuple[int, int]


def shared_documents(documents: tuple[int, ...], first: tuple[int, ...]) -> list[Bounds]:
    """Those of which more than one rank holds tokens.

    Args:
        documents, first: See ``Request``.
    """
    ranks = [(a, b) for a, b in pairwise(first) if a < b]
    found = []
    for start, stop in pairwise(documents):
        if start < stop and sum(max(a, start) < min(b, stop) for a, b in ranks) > 1:
            found.append((start, stop))
    return found


def both_ways(
    q: Tensor, k: Tensor, v: Tensor, request: Request, axis: Axis, meeting: Meeting
) -> Tensor:
    """Sums of documents that lie on one rank stay there; the others are added up over all ranks.

    Args:
        q, k: (B, L, H, D) in the dtype of the state. v: (B, L, H, Dv).
        request: Who holds what.
        axis: All ranks.
        meeting: Called before the backward communicates.

    Returns:
        (B, L, H, Dv).
    """
    start, stop = request.mine
    shared = shared_documents(request.documents, request.first)
    # a rank with no token of a document takes part with a sum over none
    here = {
        (a, b): slice(max(a, start) - start, max(min(b, stop) - start, max(a, start) - start))
        for a, b in pairwise(request.documents)
        if (a, b) in shared or max(a, start) < min(b, stop)
    }
    sums = {of: _sum(k[:, tokens], v[:, tokens]) for of, tokens in here.items()}
    if shared:
        everyone = cast(Any, _Summed).apply(torch.stack([sums[of] for of in shared]), axis, meeting)
        sums |= dict(zip(shared, everyone.unbind(), strict=True))
    # first a piece of no tokens, through which a rank without any takes part in the backward
    seen = [_seen(q[:, :0], _sum(k[:, :0], v[:, :0]))]
    seen += [_seen(q[:, tokens], sums[of]) for of, tokens in here.items()]
    return torch.cat(seen, 1)


def _seen(q: Tensor, state: Tensor) -> Tensor:
    return einsum("bihd,bhde->bihe", q, state)


def _sum(k: Tensor, v: Tensor) -> Tensor:
    return einsum("bihd,bihe->bhde", k, v)


class _Summed(OnceDifferentiable):
    """Over all ranks, and so is its gradient."""

    of = "linear attention"

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, meeting: Meeting) -> Tensor:
        ctx.axis, ctx.meeting = axis, meeting
        return axis.all_reduce(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        ctx.meeting()
        with torch.no_grad():
            found = ctx.axis.all_reduce(grad.clone(memory_format=torch.contiguous_format))
        return without_second_derivative([found], [grad], _Summed.of)[0], None, None
