"""A family of linear attention's kernels that is right, the recurrence itself; or wrong as told."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usp.linear_attention.kernels import Tokens, Traits
from usp.testing import linear_recurrence

NAME = "recurrent"
# By the name of a result, what is made of it.
SPOILED: dict[str, Any] = {}


def reasons_against(traits: Traits) -> tuple[str, ...]:
    return ()


def _spoiled(**results: Tensor) -> tuple[Tensor, ...]:
    return tuple(SPOILED.get(name, lambda x: x)(x) for name, x in results.items())


def _walked(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, before: Tensor) -> Any:
    heads = before.shape[1]
    decay = None if g is None else g.expand(*q.shape[:2], heads)
    return linear_recurrence(q, k, v, decay, initial_state=before)


def update(tokens: Tokens) -> tuple[Tensor, tuple[Tensor, ...]]:
    q = tokens.q
    _, behind = _walked(*tokens, q.new_zeros(tokens.state_shape, dtype=torch.float64))
    return _spoiled(update=behind.float())[0], ()


def forward(tokens: Tokens, before: Tensor, kept: Any, graded: bool) -> Any:
    out, behind = _walked(*tokens, before)
    return *_spoiled(out=out.to(tokens.q.dtype), final=behind.float()), (before[None],)


def _gradients(tokens: Tokens, before: Tensor, dout: Tensor, behind: Tensor) -> Any:
    leaves = [x.detach().double().requires_grad_() for x in (*tokens, before) if x is not None]
    with torch.enable_grad():
        q, k, v, *others, state = leaves
        found = _walked(q, k, v, others[0] if others else None, state)
        given = [dout.double(), behind.double()]
        options = {"allow_unused": True, "materialize_grads": True}
        gradients = torch.autograd.grad(found, leaves, given, **options)
    dtypes = [x.dtype for x in (*tokens, before) if x is not None]
    dq, dk, dv, *dg, dbefore = (x.to(y) for x, y in zip(gradients, dtypes, strict=True))
    return dq, dk, dv, dg[0] if dg else None, dbefore


def update_backward(tokens: Tokens, dout: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    none = dout.new_zeros(tokens.state_shape, dtype=torch.float32)
    return _gradients(tokens, none, dout, none)[-1], ()


def backward(
    tokens: Tokens, saved: Any, dout: Tensor, behind: Tensor, kept: Any, decays: bool
) -> Any:
    dq, dk, dv, dg, dbefore = _gradients(tokens, saved[0][0], dout, behind)
    if dg is not None:
        (dg,) = _spoiled(dg=dg)
    return *_spoiled(dq=dq, dk=dk, dv=dv), dg, dbefore
