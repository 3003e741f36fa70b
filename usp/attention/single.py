"""A call that is one visit of a kernel: nothing travels, nothing is merged or added up.

A short sequence waits for Python longer than for its attention. What the executor would find out
at each call is found out once, and the rest is what a kernel takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usp.attention import block
from usp.attention.given import Tensors
from usp.attention.ring import Ring
from usp.backends import max_bands
from usp.planning.problem import Block, Gradients, State, state_dtype
from usp.planning.visit import Visit


def single_visit(tensors: Tensors, ring: object) -> Visit | None:
    """The only visit of a call, which starts from nothing and writes the final results.

    Args:
        tensors: Of a rank that exchanges no heads.
        ring: Its executor.
    """
    if type(ring) is not Ring or ring.plan.route is not None or ring.scoring.dropout_p:
        return None
    (load, *others), backend = ring.plan.steps[0].loads, ring.backend
    if others or any(x is not None for x in tensors[3:]) or not tensors.q.numel():
        return None
    if not (load.samples.are_all and backend.CARRIES_STATE and backend.OVERWRITES):
        return None
    calls = load.calls(max_bands(backend, tensors.q.device))
    return calls[0] if len(calls) == 1 else None


def single_forward(inputs: Tensors, ring: Ring, visit: Visit) -> tuple[Tensor, Tensor]:
    """``ring_forward`` of one visit."""
    q, k, v, *_ = inputs
    batch, num_rows, num_heads, _ = q.shape
    out = q.new_empty((batch, num_rows, num_heads, v.shape[3]))
    lse = q.new_full((batch, num_heads, num_rows), -torch.inf, dtype=state_dtype(q.dtype))
    piece = Block(q, k, v, visit, ring.heads, ring.scoring)
    block.attention_forward(piece, State(None, lse, out), ring.backend)
    return out, lse


def single_backward(
    inputs: Tensors,
    results: tuple[Tensor, Tensor | None, Tensor, Tensor],
    ring: Ring,
    visit: Visit,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ring_backward`` of one visit: gradients of q, k and v.

    Args:
        results: Gradients of out and of lse, and these.
    """
    q, k, v, *_ = inputs
    saved = block.saved_for_backward(*results, ring.backend)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    piece = Block(q, k, v, visit, ring.heads, ring.scoring)
    block.attention_backward(piece, saved, Gradients(dq, dk, dv, None, True), ring.backend)
    return dq, dk, dv
