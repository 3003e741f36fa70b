"""The delta rule: a token writes how its value differs from what the state holds for its key.

Per head ``S_t = diag(exp g_t) S_{t-1} + k_t^T u_t`` with ``u_t = beta_t (v_t - k_t diag(exp g_t)
S_{t-1})``. So it is linear attention of values u, and within a chunk these are the solution of a
triangular system. It is linear in the state S before the chunk: ``u = values - keys S``. As both
are worked out beside each other, one behind the other in the last dim, all that ``chunks`` does
with values it does with u.

Shape letters: as in ``chunks``.

Source: chunks arXiv:2406.06484 (DeltaNet), 2412.06464 (gated), 2510.26692 (a decay a channel).
"""

from __future__ import annotations

import torch
from torch import Tensor

from usp.linear_attention.chunks import scores
from usp.ops.precision import einsum


def written(k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> tuple[Tensor]:
    """u of each token, by the state before its chunk.

    Args:
        k: (n, B, H, C, D). v: (n, B, H, C, Dv). beta: (n, B, H, C, 1). g: (n, b, h, C, d).

    Returns:
        (n, B, H, C, Dv + D): values and keys of ``u = values - keys S``.
    """
    own = torch.cat((v, k * g.cumsum(-2).exp()), -1)
    # of the system it reads what is below the diagonal, and 1 on it
    system = beta * scores(k, k, g)
    return (torch.linalg.solve_triangular(system, beta * own, upper=False, unitriangular=True),)


def transitions(decays: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
    """What chunks do to the state before them.

    Args:
        decays: (n, b, h, d, 1). updates: (n, B, H, D, Dv + D). See ``chunks.totals``, of u.

    Returns:
        (n, B, H, D, D) and (n, B, H, D, Dv): ``S -> T S + update``.
    """
    dim = updates.shape[-2]
    values, keys = updates.split((updates.shape[-1] - dim, dim), -1)
    eye = torch.eye(dim, dtype=decays.dtype, device=decays.device)
    return decays * eye - keys, values.contiguous()


def read(q: Tensor, g: Tensor, within: Tensor, states: Tensor) -> tuple[Tensor]:
    """What tokens see of the state before their chunk, and of their own chunk.

    Args:
        q: (n, B, H, C, D). g: (n, b, h, C, d).
        within: (n, B, H, C, Dv + D), what they see of u.
        states: (n, B, H, D, Dv).

    Returns:
        (n, B, H, C, Dv).
    """
    values, keys = within.split((states.shape[-1], states.shape[-2]), -1)
    return (values + einsum("nbhcd,nbhde->nbhce", q * g.cumsum(-2).exp() - keys, states),)
