"""What ranks send of linear attention, whatever the length: pure data."""

from __future__ import annotations

from typing import NamedTuple


class Sent(NamedTuple):
    """Numbers, of 4 bytes (8 where q is fp64), that leave a rank."""

    forward: int
    backward: int


def numbers_sent(
    state: int, decay: int, ranks: int, rank: int, method: str, returns: bool = False
) -> Sent:
    """Of one causal call.

    "gather" sends a rank's state and decay to each other one, and backward the gradient of a
    state. "ring" passes one state on, and backward its gradient back. A final state that is
    returned is known to all after a gather, and sent to all by the last rank of a ring; its
    gradients travel too.

    Args:
        state: B H D Dv.
        decay: How many decays a state has: 1 without decay, H, B H, or B H D; by the delta rule
            B H D D.
        ranks, rank: Of the mesh, in the order of the sequence.
        method: "gather" or "ring".
        returns: Whether the final state is returned.
    """
    others = ranks - 1
    if method == "gather":
        return Sent(others * (state + decay), others * state * (2 if returns else 1))
    forward, backward = state * (rank < others), state * (rank > 0)
    if returns:
        forward += others * state if rank == others else 0
        backward += state if rank < others else 0
    return Sent(forward, backward)


def numbers_summed(state: int, ranks: int, documents: int = 1) -> Sent:
    """Of a call with ``causal=False``: an all-reduce of the states of documents that several ranks
    share, forward and backward, counted as a reduce-scatter and an all-gather.

    Args:
        state, ranks: See ``numbers_sent``.
        documents: Those that more than one rank holds tokens of.
    """
    each = 2 * documents * state * (ranks - 1) // ranks
    return Sent(each, each)
