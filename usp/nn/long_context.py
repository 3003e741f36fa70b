"""The function as a module without parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from usp.attention.functional import long_context_attention
from usp.distributed.agreement import check_validate, compares_now
from usp.distributed.mesh import SequenceMesh
from usp.nn.tracing import one_node
from usp.planning.layout import Layout


class LongContextAttention(nn.Module):
    """Exact attention over a sequence that is spread over the ranks of a mesh.

    The options are those of ``long_context_attention``. Copies and pickles.

    Args:
        mesh: The ranks that share the sequence; None is one device.
        causal, window_size, prefix_len, softmax_scale, layout, seq_len, dropout_p, softcap,
        transport, return_lse, backend: See ``long_context_attention``. ``dropout_p`` is active
            in training only.
        cu_seqlens, alibi_slopes: Defaults of the arguments of ``forward``.
        validate: When ranks compare their arguments, so that a difference is an error on every
            rank and not a hang: "always", "never", or at the "first" call and then wherever
            ``long_context_attention`` does by itself: always on CPUs, and elsewhere where it
            has to ask for a length or a dropout seed.

    Raises:
        ValueError: ``validate`` is none of the three.
    """

    def __init__(
        self,
        mesh: SequenceMesh | None = None,
        *,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        cu_seqlens: Sequence[int] | Tensor | None = None,
        prefix_len: int | None = None,
        softmax_scale: float | None = None,
        layout: Layout = "contiguous",
        seq_len: int | tuple[int, int] | None = None,
        dropout_p: float = 0.0,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        transport: str = "ring",
        return_lse: bool = False,
        backend: str = "auto",
        validate: str = "first",
    ):
        super().__init__()
        check_validate(validate)
        self.mesh = mesh
        self.validate = validate
        self.dropout_p = dropout_p
        self.options: dict[str, Any] = {
            "causal": causal,
            "window_size": window_size,
            "prefix_len": prefix_len,
            "softmax_scale": softmax_scale,
            "layout": layout,
            "softcap": softcap,
            "transport": transport,
            "return_lse": return_lse,
            "backend": backend,
        }
        self.seq_len = seq_len
        self.cu_seqlens = cu_seqlens
        self.alibi_slopes: Tensor | None
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self._compared = False

    @one_node
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        seq_len: int | tuple[int, int] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of this rank's queries; see ``long_context_attention``.

        Args:
            q: (B, Lq, H, D). k: (B, Lk, G, D). v: (B, Lk, G, Dv). This rank's shards.
            key_padding_mask: (B, Lk) bool, True = ignore.
            attn_bias: (B|1, H|1, Lq|1, all keys).
            alibi_slopes, cu_seqlens, seq_len: In place of those of the constructor.

        Returns:
            (B, Lq, H, Dv), with ``return_lse`` also (B, H, Lq).
        """
        out = long_context_attention(
            q,
            k,
            v,
            self.mesh,
            key_padding_mask=key_padding_mask,
            attn_bias=attn_bias,
            alibi_slopes=self.alibi_slopes if alibi_slopes is None else alibi_slopes,
            cu_seqlens=self.cu_seqlens if cu_seqlens is None else cu_seqlens,
            seq_len=self.seq_len if seq_len is None else seq_len,
            dropout_p=self.dropout_p if self.training else 0.0,
            validate=compares_now(self.validate, self._compared),
            **self.options,
        )
        self._compared = True
        return out

    def extra_repr(self) -> str:
        shown = {k: v for k, v in self.options.items() if v not in (None, False, (None, None))}
        return ", ".join([f"mesh={self.mesh}", *(f"{k}={v!r}" for k, v in shown.items())])
