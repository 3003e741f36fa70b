"""What tokens do to the state before them: ``S -> T S + update``, where T is ``diag(decay)`` or,
by the delta rule, a matrix.

Shape letters: as in ``chunks``. T is (b, h, d, 1), a factor of each row of S or one of all, or
(B, H, D, D).
"""

from __future__ import annotations

import torch
from torch import Tensor

from usp.ops.precision import einsum


def _is_matrix(transition: Tensor) -> bool:
    """Of one key channel it is a factor all the same."""
    return transition.shape[-1] > 1


def moved(transition: Tensor, state: Tensor, update: Tensor) -> Tensor:
    """``T S + update``; states (B, H, D, Dv)."""
    if _is_matrix(transition):
        return update + einsum("bhij,bhje->bhie", transition, state)
    return torch.addcmul(update, transition, state)


def moved_back(transition: Tensor, gradient: Tensor, more: Tensor) -> Tensor:
    """``more`` and the gradient of S, by that of ``T S``; all (B, H, D, Dv)."""
    if _is_matrix(transition):
        return more + einsum("bhij,bhie->bhje", transition, gradient)
    return torch.addcmul(more, transition, gradient)


def of_transition(gradient: Tensor, state: Tensor, transition: Tensor) -> Tensor:
    """The gradient of T, by that of ``T S``."""
    if _is_matrix(transition):
        return einsum("bhie,bhje->bhij", gradient, state)
    return (gradient * state).sum_to_size(transition.shape)


def of_all(transitions: Tensor) -> Tensor:
    """T of chunks that follow each other, (n, ...); of none it changes nothing."""
    if not _is_matrix(transitions):
        return transitions.prod(0)
    dim = transitions.shape[-1]
    eye = torch.eye(dim, dtype=transitions.dtype, device=transitions.device)
    total = eye.expand(transitions.shape[1:]).contiguous()
    for transition in transitions:
        total = einsum("bhij,bhje->bhie", transition, total)
    return total
