"""The function as a module, without parameters but a learned scale and sinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from usp.attention.functional import attend
from usp.attention.given import Options, Tensors
from usp.attention.learned import refuse_gradient
from usp.distributed.agreement import check_validate, compares_now
from usp.distributed.mesh import SequenceMesh, check_mesh
from usp.nn.spread import Spread, check_spread
from usp.nn.tracing import one_node
from usp.planning.layout import Layouts
from usp.planning.masks.mask import Mask


class LongContextAttention(nn.Module):
    """Exact attention over a sequence that is spread over the ranks of a mesh.

    The options are those of ``long_context_attention``. Copies and pickles.

    Args:
        mesh: The ranks that share the sequence; None is one device.
        causal, window_size, prefix_len, layout, seq_len, softcap: See ``long_context_attention``.
        transport, return_lse, backend, chunks, head_chunks, offload: See the same.
        heads, queries, keys: See the same.
        dropout_p: The same, active in training only.
        softmax_scale, sinks: A ``nn.Parameter`` is one of the module's, to be learned.
        cu_seqlens, mask, query_offset, alibi_slopes: Defaults of the arguments of ``forward``.
        validate: When ranks compare their arguments, so that a difference is an error on every
            rank and not a hang: "always", "never", or at the "first" call and then wherever
            ``long_context_attention`` does by itself: always on CPUs, and elsewhere where it
            has to ask for a length or a dropout seed. The same on all ranks.

    Raises:
        ValueError: ``validate`` is none of the three.
    """

    def __init__(
        self,
        mesh: SequenceMesh | None = None,
        *,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        cu_seqlens: Sequence[int] | Tensor | Sequence[Sequence[int]] | None = None,
        prefix_len: int | None = None,
        mask: Mask | Sequence[Mask] | None = None,
        query_offset: int | Sequence[int] | Tensor = 0,
        softmax_scale: float | Tensor | None = None,
        layout: Layouts = "contiguous",
        seq_len: int | tuple[int, int] | str | None = None,
        dropout_p: float = 0.0,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        transport: str = "auto",
        return_lse: bool = False,
        backend: str = "auto",
        chunks: int = 1,
        head_chunks: int = 1,
        offload: str | None = None,
        heads: tuple[int, int] | None = None,
        queries: str = "sharded",
        keys: str = "sharded",
        validate: str = "first",
    ):
        super().__init__()
        check_validate(validate)
        refuse_gradient("softcap", softcap)
        self.mesh = check_mesh(mesh)
        self.validate = validate
        options = Options(
            causal=causal,
            window_size=window_size,
            prefix_len=prefix_len,
            layout=layout,
            softcap=softcap,
            transport=transport,
            return_lse=return_lse,
            backend=backend,
            chunks=chunks,
            head_chunks=head_chunks,
            offload=offload,
            heads=heads,
            queries=queries,
            keys=keys,
        )
        self.options = vars(options)  # what every call is told
        # what forward may be given instead, what training changes, and what may be a parameter
        self.seq_len = seq_len
        self.cu_seqlens = cu_seqlens
        self.mask = mask
        self.query_offset = query_offset
        self.dropout_p = dropout_p
        self.softmax_scale = softmax_scale
        self.alibi_slopes: Tensor | None
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.sinks: Tensor | None
        if isinstance(sinks, nn.Parameter):
            self.register_parameter("sinks", sinks)
        else:
            self.register_buffer("sinks", sinks, persistent=False)
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
        cu_seqlens: Sequence[int] | Tensor | Sequence[Sequence[int]] | None = None,
        mask: Mask | Sequence[Mask] | None = None,
        attn_mask: Tensor | None = None,
        key_lengths: Sequence[int] | Tensor | None = None,
        query_offset: int | Sequence[int] | Tensor | None = None,
        seq_len: int | tuple[int, int] | str | None = None,
        spread: Spread | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of this rank's queries; see ``long_context_attention``.

        Args:
            q: (B, Lq, H, D). k: (B, Lk, G, D). v: (B, Lk, G, Dv). This rank's shards.
            key_padding_mask: (B, Lk) bool, True = ignore.
            attn_bias: (B|1, H|1, Lq|1, all keys).
            attn_mask: (Lq, all keys) or (B|1, H|1, Lq|1, all keys) bool, True where a query sees.
            key_lengths: (B,) host integers, keys of each sample.
            alibi_slopes, cu_seqlens, mask, query_offset, seq_len: In place of those of the
                constructor.
            spread: In place of the constructor's mesh, layout, ``seq_len`` and ``cu_seqlens``; of
                the same mesh on all ranks.

        Returns:
            (B, Lq, H, Dv), with ``return_lse`` also (B, H, Lq).

        Raises:
            TypeError, ValueError: ``spread`` is none, or there is one of ``seq_len`` and
                ``cu_seqlens``, too; beside what the function refuses.
        """
        told = self.options | {
            "softmax_scale": self.softmax_scale,
            "sinks": self.sinks,
            "cu_seqlens": self.cu_seqlens if cu_seqlens is None else cu_seqlens,
            "mask": self.mask if mask is None else mask,
            "attn_mask": attn_mask,
            "key_lengths": key_lengths,
            "query_offset": self.query_offset if query_offset is None else query_offset,
            "seq_len": self.seq_len if seq_len is None else seq_len,
            "dropout_p": self.dropout_p if self.training else 0.0,
        }
        mesh, compare = self.mesh, compares_now(self.validate, self._compared)
        if spread is not None:
            other = cu_seqlens if seq_len is None else seq_len
            check_spread(spread, mesh, "long_context_attention", compare, other)
            placed = {"cu_seqlens": None} | spread.options
            mesh = placed.pop("mesh")
            told |= placed
        slopes = self.alibi_slopes if alibi_slopes is None else alibi_slopes
        tensors = Tensors(q, k, v, key_padding_mask, attn_bias, slopes)
        out = attend(tensors, told, mesh, None, compare)
        # a graph is run many times, and must change nothing
        if not self._compared and not torch.compiler.is_compiling():
            self._compared = True
        return out

    def extra_repr(self) -> str:
        shown = [f"mesh={self.mesh}"]
        for field in fields(Options):
            name = field.name
            value = getattr(self, name) if hasattr(self, name) else self.options[name]
            if value is not field.default and value != field.default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)
