"""What a caller gives: six tensors, and options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from usp.attention.masking import MaskOptions
from usp.planning.layout import Layouts


class Latents(NamedTuple):
    """What keys and values are made of in multi-head latent attention; see ``latent_attention``.

    Attributes:
        latent: (B, Lk, C). rope_key: (B, Lk, Dr). up_k: (H, D - Dr, C). up_v: (H, Dv, C).
    """

    latent: Tensor
    rope_key: Tensor
    up_k: Tensor
    up_v: Tensor

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return self.latent.shape[2] + self.rope_key.shape[2]


@dataclass(frozen=True)
class Options(MaskOptions):
    """The options of ``long_context_attention``; see there."""

    softmax_scale: float | Tensor | None = None
    layout: Layouts = "contiguous"
    seq_len: int | tuple[int, int] | str | None = None
    dropout_p: float = 0.0
    softcap: float | None = None
    transport: str = "auto"
    return_lse: bool = False
    backend: str = "auto"
    chunks: int = 1
    head_chunks: int = 1
    offload: str | None = None
    heads: tuple[int, int] | None = None
    queries: str = "sharded"  # what is "replicated" is told by its layout before
    keys: str = "sharded"
    attn_mask: Tensor | None = None  # what is none: another becomes a mask or a bias before
    sinks: Tensor | None = None
    latents: Latents | None = None


class Tensors(NamedTuple):
    """The tensors of ``long_context_attention``, before the head exchange and after it; this is
    their order everywhere.

    Attributes:
        q: (B, Lq, H, D). k: (B, Lk, G, D). v: (B, Lk, G, Dv).
        key_padding_mask: (B, Lk) bool, True = ignore; travels with its keys.
        attn_bias: (B|1, H|1, Lq|1, Sk), columns in global order.
        alibi_slopes: (H,) or (B|1, H).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_padding_mask: Tensor | None = None
    attn_bias: Tensor | None = None
    alibi_slopes: Tensor | None = None

    @property
    def travelling(self) -> list[Tensor]:
        """What is passed along the ring."""
        mask = self.key_padding_mask
        return [self.k, self.v] if mask is None else [self.k, self.v, mask]
