"""One rank's tokens by a family of kernels, and the states of ranks between them: one function of
autograd, which keeps its arguments and what the family asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from usp.linear_attention.exchange import Chain
from usp.linear_attention.kernels import Family, Kept, Tokens
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


def _laid_out(tokens: Tokens) -> Tokens:
    q, k, v, g = tokens
    return Tokens(_rows(q), _rows(k), _rows(v), _rows(g) if g is not None and g.dim() == 4 else g)


class Done(NamedTuple):
    """What a forward gives.

    Attributes:
        out: (B, L, H, Dv) in the dtype of q.
        final: (B, H, D, Dv) behind the whole sequence, or None.
        of_ranks: See ``Arrived``; empty on one rank.
        saved: Of the family.
    """

    out: Tensor
    final: Tensor | None
    of_ranks: tuple[Tensor, ...]
    saved: Kept


def forward(tokens: Tokens, initial: Tensor, family: Family, chain: Chain, graded: bool) -> Done:
    """What tokens see, without autograd; arguments as of ``attend`` and ``Family.forward``."""
    tokens, initial = _laid_out(tokens), initial.contiguous()
    if chain.axis.size > 1:
        update, kept = family.update(tokens)
        found = chain.forward(_transition(tokens), update, initial)()
        out, _, saved = family.forward(tokens, found.before, kept, graded)
        return Done(out, found.final, found.transitions, saved)
    out, behind, saved = family.forward(tokens, initial, (), graded)
    return Done(out, behind if chain.returns else None, (), saved)


def backward(
    tokens: Tokens,
    done: Done,
    dout: Tensor,
    dfinal: Tensor | None,
    family: Family,
    chain: Chain,
    needs: Sequence[bool],
    meet: Callable[[], None],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, g and the initial state; None of what needs none.

    Args:
        done: Of the forward; its out and final state are not asked for.
        needs: Which of the five do.
        meet: Called before ranks communicate.
    """
    tokens, rows = _laid_out(tokens), _rows(dout)
    kept: Kept = ()
    behind = dout.new_zeros(tokens.state_shape, dtype=state_dtype(dout.dtype))
    if any(needs[1:]):  # q alone needs no state's gradient
        meet()
        if chain.axis.size > 1:
            own, kept = family.update_backward(tokens, rows)
            behind = chain.backward(own, dfinal, done.of_ranks)
        elif dfinal is not None:
            behind = dfinal.contiguous()
    *of_tokens, before = family.backward(tokens, done.saved, rows, behind, kept, needs[3])
    before = before if chain.rank == 0 else torch.zeros_like(before)
    found = zip((*of_tokens, before), needs, strict=True)
    return tuple(x if is_needed else None for x, is_needed in found)


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
        tokens, graded = Tokens(q, k, v, g), any(ctx.needs_input_grad)
        done = forward(tokens, initial, family, chain, graded)
        if graded:
            ctx.save_for_backward(*tokens, *done.of_ranks, *done.saved)
            ctx.family, ctx.chain, ctx.meeting = family, chain, meeting
            ctx.count = len(done.of_ranks)
        return done.out, done.final

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        held = ctx.saved_tensors  # once: a checkpoint hands each out once
        tokens, others = Tokens(*held[:4]), held[4:]
        done = Done(dout, None, others[: ctx.count], others[ctx.count :])
        needs, of = ctx.needs_input_grad[:5], (ctx.family, ctx.chain)
        with torch.no_grad():
            gradients = backward(tokens, done, dout, dfinal, *of, needs, ctx.meeting)
        origins = dout, dfinal, *held
        return *without_second_derivative(gradients, origins, _Fused.of), None, None, None
