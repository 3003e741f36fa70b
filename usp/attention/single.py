"""A call that is one visit of a kernel: nothing travels, nothing is merged or added up.

A short sequence waits for Python longer than for its attention. What the ring's executor would
find out at each call is found out once, and the rest is what one op takes, which makes the results;
or what a family without such an op takes for its only block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from usp.attention import block
from usp.attention.block import last_dim_contiguous
from usp.attention.given import Tensors
from usp.attention.ring import Ring
from usp.backends import Backend, OnceBackend, max_bands
from usp.ops.derivatives import (
    OnceDifferentiable,
    is_differentiated,
    without_second_derivative,
)
from usp.ops.precision import as_given
from usp.planning.heads import Heads
from usp.planning.problem import Block, Gradients, Scoring
from usp.planning.visit import Visit

_CONTIGUOUS = torch.contiguous_format


class Single(NamedTuple):
    """An executor that has one visit, starts from nothing and writes the final results."""

    visit: Visit
    heads: Heads
    scoring: Scoring
    backend: Backend
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
        if not load.samples.are_all:
            return None
        visits = load.calls(max_bands(backend, tensors.q.device))
        if len(visits) != 1:
            return None
        return cls(visits[0], ring.heads, ring.scoring, backend, returns_lse)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse."""
        piece = Block(q, k, v, self.visit, self.heads, self.scoring)
        if hasattr(self.backend, "attention_once"):
            return block.attention_once(piece, cast(OnceBackend, self.backend))
        with as_given(q.device):
            piece = _last_dims_contiguous(piece)
            out = q.new_empty((*q.shape[:3], v.shape[3]))
            state = block.new_state(q, v.shape[3], carried=False)._replace(result=out)
            block.attention_forward(piece, state, self.backend)
        return out, state.lse

    def backward(
        self, inputs: tuple[Tensor, Tensor, Tensor], *results: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv.

        Args:
            inputs: q, k and v.
            results: dout, dlse or None, out and lse.
        """
        piece = Block(*inputs, self.visit, self.heads, self.scoring)
        if hasattr(self.backend, "attention_once"):
            return block.attention_once_backward(piece, results, cast(OnceBackend, self.backend))
        dout, dlse, out, lse = results
        with as_given(dout.device):
            piece = _last_dims_contiguous(piece)
            dout = last_dim_contiguous(dout)
            saved = block.saved_for_backward(dout, dlse, out, lse, self.backend)
            dq, dk, dv = (torch.empty_like(x, memory_format=_CONTIGUOUS) for x in piece[:3])
            grads = Gradients(dq, dk, dv, None, overwrite=True)
            block.attention_backward(piece, saved, grads, self.backend)
        return dq, dk, dv


def _last_dims_contiguous(piece: Block) -> Block:
    q, k, v = (last_dim_contiguous(x) for x in piece[:3])
    return piece._replace(q=q, k=k, v=v)


def single_attention(
    tensors: Tensors, single: Single, meet: Callable[[], None]
) -> tuple[Tensor, Tensor | None]:
    """``hybrid_attention`` of one visit; ``meet`` is that of its call."""
    q, k, v, *_ = tensors
    if is_differentiated(tensors):
        out, lse = cast(Any, _Attention).apply(q, k, v, single, meet)
    else:
        out, lse = single.forward(q, k, v)
    return out, lse if single.returns_lse else None


class _Attention(OnceDifferentiable):
    """Autograd over the two ops."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        single: Single,
        meet: Callable[[], None],
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = single.forward(q, k, v)
        # twice: a checkpoint that computes torch's attention in the place of this one counts
        # fewer tensors
        ctx.save_for_backward(q, k, v, out, lse, lse)
        ctx.single, ctx.meet = single, meet
        ctx.set_materialize_grads(False)
        return out, lse if single.returns_lse else None

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, _ = ctx.saved_tensors
        ctx.meet()
        backward = ctx.single.backward
        if dout is None:
            dout = torch.zeros_like(out)
        if not torch.is_grad_enabled():
            return *backward((q, k, v), dout, dlse, out, lse), None, None
        with torch.no_grad():
            found = backward((q, k, v), dout, dlse, out, lse)
        return *without_second_derivative(found, (dout, dlse, out)), None, None
