"""A block of a video transformer whose tensors are shared along time or along space, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from usp.attention.functional import long_context_attention
from usp.planning.kinds import integer
from usp.sharding.dynamic import DynamicShard

_TIME, _SPACE = 1, 2


class SpatialTemporalBlock(nn.Module):
    """Attention over space, attention over time, attention to a text, an MLP; each pre-norm and
    added to what it is given.

    Each attention has its dim whole on every rank and is computed there: the block asks its
    ``DynamicShard`` for space, then for time. Blocks one behind the other take two switches each,
    and the first of them one less where time is shared at its start; nothing else is sent. Text
    and MLP go on with whichever dim is shared.

    The gradients of the parameters and of the text are this rank's part of the sum.

    Args:
        dim: Width C of a token.
        num_heads: Heads of each attention.
        text_dim: Width of the text's tokens; None leaves that attention out.
        mlp_ratio: Width of the MLP's hidden layer over ``dim``.
        device, dtype: As in ``torch.nn.Linear``.

    Raises:
        ValueError: ``dim`` does not divide by ``num_heads``.

    Source:
        The block of Latte (arXiv:2401.03048) and Open-Sora; its switches are those of DSP,
        arXiv:2403.10266.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        text_dim: int | None = None,
        mlp_ratio: float = 4.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        heads = integer("num_heads", num_heads, least=1)
        if integer("dim", dim, least=1) % heads:
            raise ValueError(f"dim {dim} does not divide by num_heads {num_heads}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(dim * mlp_ratio)
        self.dim, self.text_dim = dim, text_dim
        self.space = _Attention(dim, dim, heads, made)
        self.time = _Attention(dim, dim, heads, made)
        self.text = None if text_dim is None else _Attention(dim, text_dim, heads, made)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim, **made),
            nn.Linear(dim, hidden, **made),
            nn.GELU(approximate="tanh"),
            nn.Linear(hidden, dim, **made),
        )

    def forward(
        self,
        x: DynamicShard,
        text: Tensor | None = None,
        text_lengths: Sequence[int] | None = None,
    ) -> DynamicShard:
        """The block's result, shared along space.

        Args:
            x: Of (B, T, S, C), that may be shared along its dims 1 and 2.
            text: (B, L, text_dim), whole on every rank and the same.
            text_lengths: Tokens of each sample's text; the rest is padding. All L by default.

        Raises:
            TypeError: ``x`` is no ``DynamicShard``.
            ValueError: ``x`` has other dims or another width, or there is a text and no
                ``text_dim``, or the other way round; says both.
        """
        self._check(x, text)
        x = x.whole(_SPACE)
        batch, frames, places, _ = x.local.shape
        y = self.space(x.local.reshape(batch * frames, places, self.dim))
        x = x.with_local(x.local + y.view_as(x.local)).whole(_TIME)
        batch, frames, places, _ = x.local.shape
        y = self.time(x.local.transpose(1, 2).reshape(batch * places, frames, self.dim))
        y = x.local + y.view(batch, places, frames, self.dim).transpose(1, 2)
        if self.text is not None:
            z = self.text(y.reshape(batch, frames * places, self.dim), text, text_lengths)
            y = y + z.view_as(y)
        return x.with_local(y + self.mlp(y))

    def _check(self, x: DynamicShard, text: Tensor | None) -> None:
        if not isinstance(x, DynamicShard):
            raise TypeError(
                f"x must be a usp.dsp.DynamicShard, got {type(x).__name__}: "
                "DynamicShard.split(x, (1, 2), mesh) makes one of a whole tensor"
            )
        if x.local.dim() != 4 or set(x.dims) != {_TIME, _SPACE} or x.local.shape[-1] != self.dim:
            raise ValueError(
                f"x must be (B, T, S, {self.dim}) with dims (1, 2), got shape {x.shape} with dims "
                f"{x.dims}"
            )
        if (text is None) != (self.text is None):
            raise ValueError(
                f"text is {None if text is None else tuple(text.shape)}, but text_dim of the block "
                f"is {self.text_dim}: give both or none"
            )


class _Attention(nn.Module):
    """Norm, projections, attention on this device, projection."""

    def __init__(self, dim: int, key_dim: int, heads: int, made: dict[str, Any]):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim, **made)
        self.q = nn.Linear(dim, dim, **made)
        self.kv = nn.Linear(key_dim, 2 * dim, **made)
        self.out = nn.Linear(dim, dim, **made)

    def forward(
        self, x: Tensor, text: Tensor | None = None, lengths: Sequence[int] | None = None
    ) -> Tensor:
        """(B, L, C) -> (B, L, C), over itself or to a text (B, L', key_dim)."""
        x = self.norm(x)
        q = self.q(x).unflatten(-1, (self.heads, -1))
        kv = self.kv(x if text is None else text).unflatten(-1, (2, self.heads, -1))
        out = long_context_attention(q, *kv.unbind(2), key_lengths=lengths)
        return cast(Tensor, self.out(cast(Tensor, out).flatten(2)))
