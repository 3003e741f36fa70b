"""The state before each chunk of all ranks: one scan forward, and one the other way backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from usp.distributed.agreement import meet_before_backward
from usp.distributed.mesh import SequenceMesh
from usp.linear_attention.exchange import Arrived, Chain
from usp.ops.derivatives import OnceDifferentiable, without_second_derivative


class Meeting:
    """Where ranks meet before they communicate backward, if they met before the forward.

    Args:
        mesh, name: See ``agreement.meet_before_backward``; None where they did not.
    """

    def __init__(self, mesh: SequenceMesh | None, name: int | None) -> None:
        self.mesh, self.name = mesh, name

    def __call__(self) -> None:
        if self.mesh is not None and self.name is not None:
            meet_before_backward(self.mesh, self.name)


@torch.no_grad()
def begin(decays: Tensor, updates: Tensor, initial: Tensor, chain: Chain) -> Callable[[], Arrived]:
    """Tell the others what all of this rank's chunks do to a state, and go on meanwhile."""
    total = torch.zeros_like(initial)
    if chain.axis.size > 1 or chain.returns:
        for decay, update in zip(decays, updates, strict=True):
            total = torch.addcmul(update, decay, total)
    return chain.forward(decays.prod(0), total, initial)


def states_before(
    decays: Tensor,
    updates: Tensor,
    initial: Tensor,
    chain: Chain,
    arrived: Callable[[], Arrived],
    meeting: Meeting,
) -> tuple[Tensor, Tensor | None]:
    """The state before each chunk of this rank, differentiable.

    Args:
        decays: (n, b, h, d, 1). updates: (n, B, H, D, Dv). Of this rank's chunks.
        initial: (B, H, D, Dv) before the whole sequence. Its gradient arrives at the first rank,
            and is 0 on the others.
        chain: The ranks.
        arrived: What ``begin`` gave.
        meeting: Called before a backward communicates.

    Returns:
        (n, B, H, D, Dv), and the final state (B, H, D, Dv) where ``chain.returns``.
    """
    return cast(Any, _States).apply(decays, updates, initial, chain, arrived, meeting)


class _States(OnceDifferentiable):
    of = "linear attention"

    @staticmethod
    def forward(
        ctx: Any,
        decays: Tensor,
        updates: Tensor,
        initial: Tensor,
        chain: Chain,
        arrived: Callable[[], Arrived],
        meeting: Meeting,
    ) -> tuple[Tensor, Tensor | None]:
        found = arrived()
        states = torch.empty_like(updates)
        state = found.before
        for i, decay in enumerate(decays):
            states[i] = state
            state = torch.addcmul(updates[i], decay, state)
        ctx.save_for_backward(decays, states, found.decays)
        ctx.chain, ctx.meeting = chain, meeting
        return states, found.final

    @staticmethod
    def backward(ctx: Any, dstates: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        decays, states, of_ranks = ctx.saved_tensors
        ctx.meeting()
        with torch.no_grad():
            found = _backward(dstates, dfinal, decays, states, of_ranks, ctx.chain)
        origins = (dstates, dfinal, decays, states)
        return *without_second_derivative(found, origins, _States.of), None, None, None


def _backward(
    dstates: Tensor,
    dfinal: Tensor | None,
    decays: Tensor,
    states: Tensor,
    of_ranks: Tensor,
    chain: Chain,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of decays, updates and the initial state."""
    gradient = dstates.new_zeros(dstates.shape[1:])
    if chain.axis.size > 1:
        for i in reversed(range(len(decays))):
            gradient = torch.addcmul(dstates[i], decays[i], gradient)
    gradient = chain.backward(gradient, dfinal, of_ranks)
    ddecays, dupdates = torch.empty_like(decays), torch.empty_like(states)
    for i in reversed(range(len(decays))):
        dupdates[i] = gradient
        ddecays[i] = (gradient * states[i]).sum_to_size(decays[i].shape)
        gradient = torch.addcmul(dstates[i], decays[i], gradient)
    return ddecays, dupdates, gradient if chain.rank == 0 else torch.zeros_like(gradient)
