"""AMD's aiter: its Triton kernels, in the signature that flash-attn 2's extension has.

flash-attn calls them itself from 2.8.4 on, where its own extension was not built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from usp.backends.library.call import How, is_there

_INSTALL = "pip install amd-aiter, or install github.com/ROCm/aiter"


@dataclass(frozen=True)
class Aiter:
    """``functions`` is the module ``flash_attn_triton_amd.flash_attn_2``."""

    functions: Any

    def forward(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor]:
        scores = how.causal, *how.window(-1), how.softcap
        if how.packed is None:
            # out, alibi_slopes, dropout_p; and at the end return_softmax, generator
            found = self.functions.fwd(q, k, v, None, None, 0.0, how.scale, *scores, False, None)
        else:
            packed = how.packed
            # out, cu_q, cu_k, seqused_k, leftpad_k, block_table, alibi_slopes, the longest
            found = self.functions.varlen_fwd(
                q, k, v, None, packed.cu_q, packed.cu_k, None, None, None, None,
                packed.max_q, packed.max_k, 0.0, how.scale, False, *scores, False, None,
            )  # fmt: skip
        return found[0], found[1]

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        how: How,
        dlse: Tensor | None,
    ) -> Sequence[Tensor]:
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        scores = how.causal, *how.window(-1), how.softcap
        if how.packed is None:
            # alibi_slopes, dropout_p; and at the end deterministic, generator, its state
            self.functions.bwd(
                dout, q, k, v, out, lse, *grads, None, 0.0, how.scale, *scores, False, None, None
            )
        else:
            packed = how.packed
            # cu_q, cu_k, alibi_slopes, the longest, dropout_p, scale, zero_tensors
            self.functions.varlen_bwd(
                dout, q, k, v, out, lse, *grads, packed.cu_q, packed.cu_k, None,
                packed.max_q, packed.max_k, 0.0, how.scale, False, *scores, False, None, None,
            )  # fmt: skip
        return grads


def missing() -> str | None:
    return None if is_there("aiter") else f"aiter is not installed: {_INSTALL}"


def load() -> Aiter:
    from aiter.ops.triton._triton_kernels.flash_attn_triton_amd import flash_attn_2

    return Aiter(flash_attn_2)
