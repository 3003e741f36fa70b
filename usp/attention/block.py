"""One block of keys into the running softmax, forward and backward."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from usp.backends import Backend, OnceBackend, PartialBackend, StateBackend
from usp.ops.delta import row_products
from usp.ops.merge import merge_into
from usp.planning.problem import Block, Gradients, Saved, State, state_dtype


def last_dim_contiguous(x: Tensor) -> Tensor:
    """As kernels take it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def new_state(q: Tensor, value_head_dim: int, *, carried: bool = True) -> State:
    """The state before any key: out 0, lse -inf.

    Args:
        q: (B, Lq, H, D).
        value_head_dim: Dv.
        carried: Whether more than one block will come; else there is no ``out`` to carry.
    """
    batch, num_rows, num_heads = q.shape[:3]
    dtype, out = state_dtype(q.dtype), None
    if carried:
        out = q.new_zeros((batch, num_rows, num_heads, value_head_dim), dtype=dtype)
    return State(out, q.new_full((batch, num_heads, num_rows), -torch.inf, dtype=dtype))


def attention_forward(block: Block, state: State, backend: Backend) -> None:
    """Let one block of keys into the running softmax.

    For a row i and a visible key j: s_ij = softmax_scale * <q_i, k_j> (capped, biased);
    lse_i = log(exp(lse_i) + sum_j exp(s_ij)), out_i the matching convex sum of v_j.

    Args:
        block: Queries, keys and what they see of each other.
        state: Updated in place; where it has a ``result``, this is the last block.
        backend: Whose kernel.

    Source:
        Tiling: FlashAttention-2, arXiv:2307.08691. Ring: arXiv:2310.01889.
    """
    if backend.CARRIES_STATE:
        cast(StateBackend, backend).attention_forward(block, state)
        return
    carried = state.out
    if carried is None:
        carried = cast(Tensor, new_state(block.q, block.v.shape[-1]).out)
    for rows, out, lse in cast(PartialBackend, backend).attention_partials(block):
        merge_into(carried[:, rows], state.lse[:, :, rows], out, lse)
    if state.result is not None:
        state.result.copy_(carried)


def attention_once(block: Block, backend: OnceBackend) -> tuple[Tensor, Tensor]:
    """``attention_forward`` of the only block: out (B, Lq, H, Dv) in the dtype of q, and the LSE.

    Args:
        block: Without bias, ALiBi and dropout; any strides.
        backend: Whose kernel.
    """
    return backend.attention_once(block)


def attention_once_backward(
    block: Block, results: tuple[Tensor, Tensor | None, Tensor, Tensor], backend: OnceBackend
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of its q, k and v, in their dtype.

    Args:
        block: As in the forward.
        results: The gradients of out and of the LSE, or None, and these.
        backend: Whose kernel.
    """
    return backend.attention_once_backward(block, *results)


def saved_for_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, backend: Backend
) -> Saved:
    """What every block's backward shares: delta once for the whole pass.

    Args:
        dout, out: (B, Lq, H, Dv), dtype of q.
        dlse: (B, H, Lq) gradient of the returned lse, or None.
        lse: (B, H, Lq), final.
        backend: Whose kernel.
    """
    if backend.CARRIES_STATE:
        delta = cast(StateBackend, backend).delta(dout, out)
    else:
        delta = row_products(dout, out, lse.dtype)
    if dlse is not None:
        delta = delta - dlse
    return Saved(dout, out, lse, delta.contiguous(), dlse is not None)


def attention_backward(block: Block, saved: Saved, grads: Gradients, backend: Backend) -> None:
    """Add one block's gradients to ``grads``.

    ``p_ij = exp(s_ij - lse_i)`` with the final lse, ``ds_ij = p_ij (<dout_i, v_j> - delta_i)``.

    Args:
        block: As in the forward.
        saved: The final output, its gradient, lse and delta.
        grads: Added to in place, or overwritten; dbias has the shape of ``block.bias``.
        backend: Whose kernel.
    """
    if not grads.overwrite or backend.OVERWRITES:
        backend.attention_backward(block, saved, grads)
        return
    dtype = saved.lse.dtype
    places = grads.dq, grads.dk, grads.dv
    dq, dk, dv = (
        x.zero_() if x.dtype == dtype else torch.zeros_like(x, dtype=dtype) for x in places
    )
    backend.attention_backward(block, saved, Gradients(dq, dk, dv, grads.dbias))
    for place, total in zip(places, (dq, dk, dv), strict=True):
        if place is not total:
            place.copy_(total)
