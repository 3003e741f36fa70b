"""What a family of kernels of one rank's tokens is given, and what it promises: a module with
``NAME`` and the functions of ``Family``; ``families`` has the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Kept = tuple[Tensor, ...]


class Tokens(NamedTuple):
    """Those of one rank, and what is theirs.

    Attributes:
        q: (B, L, Hq, D). k: (B, L, Hk, D). v: (B, L, Hv, Dv). Of one dtype, last dim contiguous,
            any other strides; L may be 0. H, the largest number of heads, is a multiple of each,
            and each head stands for H / of them neighbours.
        g: (B | 1, L, H | 1), logs of the decay of each token in the dtype of the state, any
            strides, -inf where a document starts; (B | 1, L, H | 1, D) with one a channel, the last
            dim contiguous; None for no decay.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None

    @property
    def heads(self) -> int:
        return max(x.shape[2] for x in (self.q, self.k, self.v))

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """(B, H, D, Dv)."""
        return self.q.shape[0], self.heads, self.q.shape[3], self.v.shape[3]


def of_groups(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, by that of each head: heads that share one of x are added up."""
    if gradient.shape[2] == x.shape[2]:
        return gradient
    return gradient.unflatten(2, (x.shape[2], -1)).sum(3).to(x.dtype)


@dataclass(frozen=True)
class Traits:
    """What a family may have reasons against.

    Attributes:
        device: Of the tensors.
        dtype: Of q, k and v.
        dims: D and Dv.
        decay: None, "heads", "tokens" or "channels".
        delta: Whether it is the delta rule.
    """

    device: torch.device
    dtype: torch.dtype
    dims: tuple[int, int]
    decay: str | None = None
    delta: bool = False


class Family(Protocol):
    """Kernels of one pass over a rank's tokens. All states and their gradients are (B, H, D, Dv),
    contiguous, in the dtype of the state; what is handed in is not written to.
    """

    NAME: str

    def reasons_against(self, traits: Traits) -> tuple[str, ...]:
        """Why it does not take a problem; empty where it does."""

    def update(self, tokens: Tokens) -> tuple[Tensor, Kept]:
        """The state behind the tokens, if that before them is empty. Not asked for on one rank.

        Returns:
            The state, and whatever ``forward`` may use again.
        """

    def forward(
        self, tokens: Tokens, before: Tensor, kept: Kept, graded: bool
    ) -> tuple[Tensor, Tensor, Kept]:
        """What tokens see.

        Args:
            before: The state before the tokens.
            kept: Of ``update``; empty where it was not asked for.
            graded: Whether there will be a backward.

        Returns:
            out (B, L, H, Dv) in the dtype of q, the state behind the tokens, and, if ``graded``,
            one tensor (n, B, H, D, Dv) of states for ``backward``, that before the tokens or those
            before each segment.
        """

    def update_backward(self, tokens: Tokens, dout: Tensor) -> tuple[Tensor, Kept]:
        """The gradient of the state before the tokens, if that of the state behind them is 0. Not
        asked for on one rank.

        Args:
            dout: (B, L, H, Dv) in the dtype of q, last dim contiguous.
        """

    def backward(
        self, tokens: Tokens, saved: Kept, dout: Tensor, behind: Tensor, kept: Kept, decays: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """Every gradient.

        Args:
            saved: Of ``forward``; there may be more states behind them.
            behind: The gradient of the state behind the tokens.
            kept: Of ``update_backward``; empty where it was not asked for.
            decays: Whether that of g is asked for.

        Returns:
            dq, dk and dv, shapes and dtype of q, k and v; dg in the shape of g, or None; and the
            gradient of the state before the tokens.
        """
