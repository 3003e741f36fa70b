"""Linear attention in plain PyTorch, chunk by chunk: for everything, on any device; and as a family
of kernels, for graphs where no other takes the problem.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from usp.linear_attention import chunks, delta
from usp.linear_attention.exchange import Chain
from usp.linear_attention.kernels import Kept, Tokens, Traits
from usp.linear_attention.slabs import in_slabs
from usp.linear_attention.states import Meeting, begin, states_before
from usp.linear_attention.transitions import moved, moved_back
from usp.ops.precision import einsum
from usp.planning.problem import state_dtype

# Asked for once what is on its way is needed.
Between = Callable[[], tuple[Tensor, Tensor | None]]
# Of transitions and updates of chunks and the initial state: begins to find the states before
# chunks, and the last.
Begin = Callable[[Tensor, Tensor, Tensor], Between]

NAME = "plain"


class Wide(NamedTuple):
    """Tokens in the dtype of the state, all heads of them.

    Attributes:
        q, k: (B, L, H, D). v: (B, L, H, Dv). g: (b, L, h, d). beta: (B, L, H, 1), or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor | None = None


def walk(tokens: Wide, initial: Tensor, between: Begin) -> tuple[Tensor, Tensor | None]:
    """Chunks see each other through states; what they see of themselves is worked out while the
    ranks' states are on their way.

    Returns:
        (B, L, H, Dv), and the last state as ``between`` has it.
    """
    length = tokens.q.shape[1]
    size = chunks.chunk_size(length)
    q, k, v, g = (chunks.chunked(x, size) for x in tokens[:4])
    if tokens.beta is not None:
        (v,) = in_slabs(delta.written, k, v, chunks.chunked(tokens.beta, size), g)
    transitions, updates = in_slabs(chunks.totals, k, v, g)
    if tokens.beta is not None:
        transitions, updates = delta.transitions(transitions, updates)
    arrived = between(transitions, updates, initial)
    (out,) = in_slabs(chunks.within, q, k, v, g)
    states, final = arrived()
    if tokens.beta is not None:
        (out,) = in_slabs(delta.read, q, g, out, states)
    else:
        out = out + in_slabs(chunks.read, q, g, states)[0]
    return chunks.joined(out, length), final


def all_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, H, .) in the dtype of the state."""
    x = x.to(state_dtype(x.dtype))
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def reasons_against(traits: Traits) -> tuple[str, ...]:
    return ()


def update(tokens: Tokens) -> tuple[Tensor, Kept]:
    _, k, v, g = _chunked(tokens)
    transitions, updates = in_slabs(chunks.totals, k, v, g)
    state = updates.new_zeros(tokens.state_shape)
    for transition, more in zip(transitions, updates, strict=True):
        state = moved(transition, state, more)
    return state, ()


def forward(
    tokens: Tokens, before: Tensor, kept: Kept, graded: bool
) -> tuple[Tensor, Tensor, Kept]:
    out, behind = _walked(tokens, before)
    return out, behind, (before[None],) if graded else ()


def update_backward(tokens: Tokens, dout: Tensor) -> tuple[Tensor, Kept]:
    q, _, dout, g = _chunked(tokens._replace(v=dout))
    found = einsum("nbhcd,nbhce->nbhde", q * g.cumsum(-2).exp(), dout)
    gradient = found.new_zeros(tokens.state_shape)
    for transition, more in zip(g.sum(-2).exp()[..., None].flip(0), found.flip(0), strict=True):
        gradient = moved_back(transition, gradient, more)
    return gradient, ()


def backward(
    tokens: Tokens, saved: Kept, dout: Tensor, behind: Tensor, kept: Kept, decays: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (*tokens, saved[0][0]) if x is not None]
    q, k, v, *of_decay, before = leaves
    with torch.enable_grad():
        g = of_decay[0] if of_decay else None
        found = _walked(Tokens(q, k, v, g), before)
        dq, dk, dv, *dg, dbefore = torch.autograd.grad(found, leaves, (dout, behind))
    return dq, dk, dv, dg[0] if dg and decays else None, dbefore


def _wide(tokens: Tokens) -> Wide:
    q, k, v = (all_heads(x, tokens.heads) for x in tokens[:3])
    g = tokens.g
    if g is None:
        return Wide(q, k, v, q.new_zeros(1, q.shape[1], 1, 1))
    return Wide(q, k, v, g if g.dim() == 4 else g[..., None])


def _chunked(tokens: Tokens) -> tuple[Tensor, ...]:
    size = chunks.chunk_size(tokens.q.shape[1])
    return tuple(chunks.chunked(x, size) for x in _wide(tokens)[:4])


def _walked(tokens: Tokens, before: Tensor) -> tuple[Tensor, Tensor]:
    """out in the dtype of q, and the state behind the tokens."""
    chain, meeting = Chain.of(None, "gather", True), Meeting(None, None)

    def between(transitions: Tensor, updates: Tensor, initial: Tensor) -> Between:
        arrived = begin(transitions, updates, initial, chain)
        return lambda: states_before(transitions, updates, initial, chain, arrived, meeting)

    out, behind = walk(_wide(tokens), before, between)
    assert behind is not None
    return out.to(tokens.q.dtype), behind
