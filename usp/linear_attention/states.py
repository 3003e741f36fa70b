"""The state before each chunk of all ranks: one scan forward, and one the other way backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from usp.distributed.agreement import meet_before_backward
from usp.distributed.mesh import SequenceMesh
from usp.linear_attention.exchange import Arrived, Chain
from usp.linear_attention.transitions import moved, moved_back, of_all, of_transition
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
def begin(
    transitions: Tensor, updates: Tensor, initial: Tensor, chain: Chain
) -> Callable[[], Arrived]:
    """Tell the others what all of this rank's chunks do to a state, and go on meanwhile."""
    total, count = torch.zeros_like(initial), 0
    if chain.axis.size > 1 or chain.returns:
        count = len(transitions)
        for transition, update in zip(transitions, updates, strict=True):
            total = moved(transition, total, update)
    return chain.forward(of_all(transitions[:count]), total, initial)


def states_before(
    transitions: Tensor,
    updates: Tensor,
    initial: Tensor,
    chain: Chain,
    arrived: Callable[[], Arrived],
    meeting: Meeting,
) -> tuple[Tensor, Tensor | None]:
    """The state before each chunk of this rank, differentiable.

    Args:
        transitions: (n, b, h, d, 1) or (n, B, H, D, D). updates: (n, B, H, D, Dv). Of this rank's
            chunks.
        initial: (B, H, D, Dv) before the whole sequence. Its gradient arrives at the first rank,
            and is 0 on the others.
        chain: The ranks.
        arrived: What ``begin`` gave.
        meeting: Called before a backward communicates.

    Returns:
        (n, B, H, D, Dv), and the final state (B, H, D, Dv) where ``chain.returns``.
    """
    return cast(Any, _States).apply(transitions, updates, initial, chain, arrived, meeting)


class _States(OnceDifferentiable):
    of = "linear attention"

    @staticmethod
    def forward(
        ctx: Any,
        transitions: Tensor,
        updates: Tensor,
        initial: Tensor,
        chain: Chain,
        arrived: Callable[[], Arrived],
        meeting: Meeting,
    ) -> tuple[Tensor, Tensor | None]:
        found = arrived()
        states = scanned(transitions, updates, found.before)
        ctx.save_for_backward(transitions, states, *found.transitions)
        ctx.chain, ctx.meeting = chain, meeting
        return states, found.final

    @staticmethod
    def backward(ctx: Any, dstates: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        transitions, states, *of_ranks = ctx.saved_tensors
        ctx.meeting()
        with torch.no_grad():
            found = gradients_of(dstates, dfinal, transitions, states, tuple(of_ranks), ctx.chain)
        origins = (dstates, dfinal, transitions, states)
        return *without_second_derivative(found, origins, _States.of), None, None, None


def scanned(transitions: Tensor, updates: Tensor, state: Tensor) -> Tensor:
    """(n, B, H, D, Dv), the state before each chunk, by that before the first."""
    states = torch.empty_like(updates)
    for i, transition in enumerate(transitions):
        states[i] = state
        state = moved(transition, state, updates[i])
    return states


def gradients_of(
    dstates: Tensor,
    dfinal: Tensor | None,
    transitions: Tensor,
    states: Tensor,
    of_ranks: tuple[Tensor, ...],
    chain: Chain,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of transitions, updates and the initial state.

    Args:
        dstates, dfinal: Of what ``states_before`` returns.
        of_ranks: See ``Arrived``.
    """
    gradient = dstates.new_zeros(dstates.shape[1:])
    if chain.axis.size > 1:
        for i in reversed(range(len(transitions))):
            gradient = moved_back(transitions[i], gradient, dstates[i])
    gradient = chain.backward(gradient, dfinal, of_ranks)
    dtransitions, dupdates = torch.empty_like(transitions), torch.empty_like(states)
    for i in reversed(range(len(transitions))):
        dupdates[i] = gradient
        dtransitions[i] = of_transition(gradient, states[i], transitions[i])
        gradient = moved_back(transitions[i], gradient, dstates[i])
    return dtransitions, dupdates, gradient if chain.rank == 0 else torch.zeros_like(gradient)
