"""The compiled extension's kernels, on a CPU: chunks of a head one behind the other, in its cache.

Where there are more threads than heads the tokens are cut into parts: the update of each first,
which gives the states between them, and then all parts at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from usp.linear_attention.kernels import Kept, Tokens, Traits, of_groups
from usp.linear_attention.transitions import moved, moved_back
from usp.ops import native as ops
from usp.planning.problem import state_dtype

NAME = "native"
# Tokens from one state that is kept for the backward to the next, in whole chunks of the kernels.
SEGMENT = 256
# What updates of the parts cost beside all else.
_MORE = 1.25


def segments(length: int) -> int:
    """How many states are kept of so many tokens."""
    return -(-length // SEGMENT)


def reasons_against(traits: Traits) -> tuple[str, ...]:
    error = ops.load_error()
    if error is not None:
        return (f"the compiled extension is not there: {error}",)
    if traits.device.type != "cpu":
        return (f"its kernels take CPU tensors, q is on {traits.device}",)
    reasons = []
    if traits.delta:
        reasons.append("it has no kernels for the delta rule")
    return tuple(reasons)


def update(tokens: Tokens) -> tuple[Tensor, Kept]:
    parts, empty = _parts(tokens), _zeros(tokens)
    states = empty.expand(parts, *empty.shape).contiguous()
    _, k, v, g = tokens
    torch.ops.usp.linear_forward(None, k, v, g, SEGMENT, states, None, None)
    if parts == 1:
        return states[0], (states,)
    return _states(tokens, empty, states)[1], (states,)


def forward(
    tokens: Tokens, before: Tensor, kept: Kept, graded: bool
) -> tuple[Tensor, Tensor, Kept]:
    parts, states = _parts(tokens), before[None].clone()
    if parts > 1:
        (updates,) = kept or update(tokens)[1]
        states, _ = _states(tokens, before, updates)
    shape = tokens.q.shape[:2]
    out = tokens.q.new_empty(*shape, tokens.heads, tokens.v.shape[3])
    saved = before.new_empty(segments(shape[1]), *before.shape) if graded else None
    torch.ops.usp.linear_forward(*tokens, SEGMENT, states, saved, out)
    return out, states[-1], () if saved is None else (saved,)


def update_backward(tokens: Tokens, dout: Tensor) -> tuple[Tensor, Kept]:
    parts, empty = _parts(tokens), _zeros(tokens)
    states = empty.expand(parts, *empty.shape).contiguous()
    none = (None,) * 4
    torch.ops.usp.linear_backward(
        dout, tokens.q, None, None, tokens.g, SEGMENT, None, states, *none
    )
    if parts == 1:
        return states[0], (states,)
    return _gradients(tokens, empty, states)[1], (states,)


def backward(
    tokens: Tokens, saved: Kept, dout: Tensor, behind: Tensor, kept: Kept, decays: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    parts, states = _parts(tokens), behind[None].clone()
    before = states[0]
    if parts > 1:
        (updates,) = kept or update_backward(tokens, dout)[1]
        states, before = _gradients(tokens, behind, updates)
    q, k, v, g = tokens
    dq, dk, dv = (_room(x, tokens.heads) for x in (q, k, v))
    dg = None
    if decays and g is not None:
        dg = behind.new_empty(*q.shape[:2], tokens.heads, *g.shape[3:])
    before_segments = saved[0][: segments(q.shape[1])]
    torch.ops.usp.linear_backward(
        dout, q, k, v, g, SEGMENT, before_segments, states, dq, dk, dv, dg
    )
    if dg is not None and g is not None:
        dg = dg.sum_to_size(g.shape)
    of_q, of_k, of_v = (of_groups(dx, x) for dx, x in ((dq, q), (dk, k), (dv, v)))
    return of_q, of_k, of_v, dg, before


def _parts(tokens: Tokens) -> int:
    """As many as let the threads be done first; one where heads are enough."""
    walks, threads = tokens.q.shape[0] * tokens.heads, torch.get_num_threads()
    count = segments(tokens.q.shape[1])

    def cost(parts: int) -> float:
        turns = -(-walks * parts // threads) * -(-count // parts)
        return turns * (_MORE if parts > 1 else 1.0)

    return min(range(1, max(1, min(count, 2 * threads)) + 1), key=cost)


def _zeros(tokens: Tokens) -> Tensor:
    return tokens.q.new_zeros(tokens.state_shape, dtype=state_dtype(tokens.q.dtype))


def _room(x: Tensor, heads: int) -> Tensor:
    """For the gradient of each head: where several share one, in the dtype of their sum."""
    dtype = x.dtype if x.shape[2] == heads else state_dtype(x.dtype)
    return x.new_empty(*x.shape[:2], heads, x.shape[3], dtype=dtype)


def _decays(tokens: Tokens, parts: int) -> Tensor:
    """(parts, b, h, d, 1), by which each decays the state before it."""
    if tokens.g is None:
        return tokens.q.new_ones(parts, 1, 1, 1, 1, dtype=state_dtype(tokens.q.dtype))
    each = -(-segments(tokens.q.shape[1]) // parts) * SEGMENT
    g = tokens.g if tokens.g.dim() == 4 else tokens.g[..., None]
    g = F.pad(g, (0, 0, 0, 0, 0, each * parts - g.shape[1]))
    return g.unflatten(1, (parts, each)).sum(2).transpose(0, 1).exp()[..., None]


def _states(tokens: Tokens, state: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each part, and behind them all."""
    states = torch.empty_like(updates)
    for i, decay in enumerate(_decays(tokens, len(updates))):
        states[i] = state
        state = moved(decay, state, updates[i])
    return states, state


def _gradients(tokens: Tokens, gradient: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the state behind each part, and before them all."""
    gradients = torch.empty_like(updates)
    decays = _decays(tokens, len(updates))
    for i in reversed(range(len(updates))):
        gradients[i] = gradient
        gradient = moved_back(decays[i], gradient, updates[i])
    return gradients, gradient
