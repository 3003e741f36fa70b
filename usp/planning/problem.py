"""What one block of attention is made of: plain data for ``block.py`` and the backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from usp.planning.heads import Heads
from usp.planning.visit import Visit


@dataclass(frozen=True)
class Scoring:
    """How a score is made of ``<q, k>``, and which weights are dropped.

    Attributes:
        softmax_scale: Factor of the scores, dimensionless.
        softcap: ``softcap * tanh(score / softcap)`` before any bias; 0 is off.
        dropout_p: Probability that a weight is dropped.
        dropout_seed: 64-bit key of the random numbers.
    """

    softmax_scale: float
    softcap: float = 0.0
    dropout_p: float = 0.0
    dropout_seed: int = 0


class Block(NamedTuple):
    """Queries of this rank against the keys of one owner.

    Attributes:
        q: (B, Lq, H, D). k: (B, Lk, G, D). v: (B, Lk, G, Dv). Last dim contiguous.
        visit: The visible pairs.
        bias: (B|1, H|1, Lq|1, Lk) added to the scores, in the dtype of the state, or None.
        alibi_slopes: (B|1, H) in the dtype of the state, or None.
        q_pos, k_pos: (Lq,), (Lk,) int32 global positions where ALiBi or dropout needs them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    visit: Visit
    heads: Heads
    scoring: Scoring
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    q_pos: Tensor | None = None
    k_pos: Tensor | None = None

    @property
    def span(self) -> tuple[Tensor, Tensor] | None:
        """``first, stop`` (Lq,) int32 on the device of q; None where every row sees every key."""
        return None if self.visit.span is None else self.visit.span.on(self.q.device)

    @property
    def options(self) -> tuple[Any, ...]:
        """All but q, k, v in the order of the kernel contract, ``first`` to ``dropout_seed``."""
        heads, scoring = self.heads, self.scoring
        return (
            *(self.span or (None, None)),
            self.bias,
            self.alibi_slopes,
            self.q_pos,
            self.k_pos,
            heads.offset,
            heads.total,
            heads.group_size,
            scoring.softmax_scale,
            scoring.softcap,
            scoring.dropout_p,
            scoring.dropout_seed,
        )


class State(NamedTuple):
    """The running softmax of this rank's queries.

    Attributes:
        out: (B, Lq, H, Dv) normalised, fp32 (fp64 for fp64 inputs); None before any key where the
            first block is the last.
        lse: (B, H, Lq) natural log of the sum of exp(score), -inf for a row that saw nothing.
        result: (B, Lq, H, Dv) in the dtype of q, given with the last block: the final output goes
            there, and ``out`` stays as it was.
    """

    out: Tensor | None
    lse: Tensor
    result: Tensor | None = None


class Saved(NamedTuple):
    """What the backward of a block needs from the whole pass.

    Attributes:
        dout, out: (B, Lq, H, Dv), dtype of q; the final output and its gradient.
        lse: (B, H, Lq), the final one.
        delta: (B, H, Lq), sum of dout * out over Dv, less the gradient of lse.
        lse_has_gradient: Whether there is one.
    """

    dout: Tensor
    out: Tensor
    lse: Tensor
    delta: Tensor
    lse_has_gradient: bool = False


class Gradients(NamedTuple):
    """Sums to add a block's gradients to, in the dtype of the state; shapes of q, k, v, bias.

    Attributes:
        overwrite: For the only block: dq, dk and dv hold nothing yet, and each is in the dtype of
            q or of the state.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Traits:
    """What a backend has to know of a problem to say whether it takes it."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    value_head_dim: int
    softmax_scale: float
    bias: bool = False
    softcap: bool = False
    alibi: bool = False
    dropout: bool = False
    returns_lse: bool = False
    architecture: str = ""  # of the device, where it is known
    device: torch.device | None = None  # likewise


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of softmax, sums and gradients: fp32, and fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
