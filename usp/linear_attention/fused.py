"""One rank's tokens by a family of kernels, and the states of ranks between them: one function of
autograd, which keeps its arguments and what the family asks for.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from usp.linear_attention.exchange import Chain
from usp.linear_attention.kernels import Family, Tokens
from usp.linear_attention.states import Meeting
from usp.ops.derivatives import OnceDifferentiable, without_second_derivative
from usp.planning.problem import state_dtype


def attend(
    tokens: Tokens, initial: Tensor, family: Family, chain: Chain, meeting: Meeting
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention of this rank's tokens.

    Args:
        initial: (B, H, D, Dv) before the whole sequence, in the dtype of the state.
        chain, meeting: See ``states_before``.

    Returns:
        out (B, L, H, Dv) in the dtype of q, and the final state where ``chain.returns``.
    """
    return cast(Any, _Fused).apply(*tokens, initial, family, chain, meeting)


def _transition(tokens: Tokens) -> Tensor:
    """(B | 1, H | 1, D | 1, 1), by which all tokens decay the state before them."""
    if tokens.g is None:
        return tokens.q.new_ones(1, 1, 1, 1, dtype=state_dtype(tokens.q.dtype))
    sums = tokens.g.sum(1).exp()
    return sums[..., None] if sums.dim() == 3 else sums[..., None, None]


def _rows(x: Tensor) -> Tensor:
    """With its last dim contiguous."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


class _Fused(OnceDifferentiable):
    of = "linear attention"

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        initial: Tensor,
        family: Family,
        chain: Chain,
        meeting: Meeting,
    ) -> tuple[Tensor, Tensor | None]:
        tokens = Tokens(_rows(q), _rows(k), _rows(v), g if g is None or g.dim() == 3 else _rows(g))
        graded = any(ctx.needs_input_grad)
        of_ranks: tuple[Tensor, ...] = ()
        if chain.axis.size > 1:
            update, kept = family.update(tokens)
            found = chain.forward(_transition(tokens), update, initial.contiguous())()
            of_ranks = found.transitions
            out, _, saved = family.forward(tokens, found.before, kept, graded)
            final = found.final
        else:
            out, behind, saved = family.forward(tokens, initial.contiguous(), (), graded)
            final = behind if chain.returns else None
        if graded:
            ctx.save_for_backward(*tokens, *of_ranks, *saved)
            ctx.family, ctx.chain, ctx.meeting = family, chain, meeting
            ctx.count = len(of_ranks)
        return out, final

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        held = ctx.saved_tensors  # once: a checkpoint hands each out once
        tokens, others = Tokens(*held[:4]), held[4:]
        of_ranks, saved = others[: ctx.count], others[ctx.count :]
        needs, chain, family = ctx.needs_input_grad[:5], ctx.chain, ctx.family
        with torch.no_grad():
            rows, kept = _rows(dout), ()
            behind = dout.new_zeros(tokens.state_shape, dtype=state_dtype(dout.dtype))
            if any(needs[1:]):  # q alone needs no state's gradient
                ctx.meeting()
                if chain.axis.size > 1:
                    own, kept = family.update_backward(tokens, rows)
                    behind = chain.backward(own, dfinal, of_ranks)
                elif dfinal is not None:
                    behind = dfinal.contiguous()
            found = family.backward(tokens, saved, rows, behind, kept, needs[3])
        *of_tokens, before = found
        before = before if chain.rank == 0 else torch.zeros_like(before)
        gradients = [
            x if is_needed else None
            for x, is_needed in zip((*of_tokens, before), needs, strict=True)
        ]
        origins = dout, dfinal, *held
        return *without_second_derivative(gradients, origins, _Fused.of), None, None, None
