"""A call that is one visit of a kernel: nothing travels, nothing is merged or added up.

A short sequence waits for Python longer than for its attention. What the ring's executor would
find out at each call is found out once, and the rest is what one op takes, which makes the results.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from usp.attention import block
from usp.attention.given import Tensors
from usp.attention.ring import Ring
from usp.backends import OnceBackend, max_bands
from usp.ops.derivatives import (
    OnceDifferentiable,
    is_differentiated,
    without_second_derivative,
)
from usp.planning.heads import Heads
from usp.planning.problem import Block, Scoring
from usp.planning.visit import Visit


class Single(NamedTuple):
    """An executor that has one visit, starts from nothing and writes the final results."""

    visit: Visit
    heads: Heads
    scoring: Scoring
    backend: OnceBackend
    returns_lse: bool

    @classmethod
    def of(cls, tensors: Tensors, ring: object, returns_lse: bool) -> Single | None:
        """In the place of another executor, where that is all there is to do.

        Args:
            tensors: Of a rank that exchanges no heads.
            ring: The other.
            returns_lse: Whether the call does.
        """
        if type(ring) is not Ring or ring.plan.route is not None or ring.scoring.dropout_p:
            return None
        (load, *others), backend = ring.plan.steps[0].loads, ring.backend
        if others or any(x is not None for x in tensors[3:]) or not tensors.q.numel():
            return None
        if not (load.samples.are_all and hasattr(backend, "attention_once")):
            return None
        visits = load.calls(max_bands(backend, tensors.q.device))
        if len(visits) != 1:
            return None
        return cls(visits[0], ring.heads, ring.scoring, cast(OnceBackend, backend), returns_lse)


def single_attention(tensors: Tensors, single: Single) -> tuple[Tensor, Tensor | None]:
    """``hybrid_attention`` of one visit."""
    q, k, v, *_ = tensors
    if is_differentiated(tensors):
        out, lse = cast(Any, _Attention).apply(q, k, v, single)
    else:
        out, lse = block.attention_once(
            Block(q, k, v, single.visit, single.heads, single.scoring), single.backend
        )
    return out, lse if single.returns_lse else None


class _Attention(OnceDifferentiable):
    """Autograd over the two ops."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, single: Single
    ) -> tuple[Tensor, Tensor | None]:
        piece = Block(q, k, v, single.visit, single.heads, single.scoring)
        out, lse = block.attention_once(piece, single.backend)
        # twice: a checkpoint that computes torch's attention in the place of this one counts
        # fewer tensors
        ctx.save_for_backward(q, k, v, out, lse, lse)
        ctx.single = single
        ctx.set_materialize_grads(False)
        return out, lse if single.returns_lse else None

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, _ = ctx.saved_tensors
        single = ctx.single
        piece = Block(q, k, v, single.visit, single.heads, single.scoring)
        if dout is None:
            dout = torch.zeros_like(out)
        if not torch.is_grad_enabled():
            given = dout, dlse, out, lse
            return *block.attention_once_backward(piece, given, single.backend), None
        with torch.no_grad():
            found = block.attention_once_backward(piece, (dout, dlse, out, lse), single.backend)
        return *without_second_derivative(found, (dout, dlse, out)), None
