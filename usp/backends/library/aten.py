"""torch's own attention ops on GPUs, which return an LSE: flash, cuDNN and efficient.

What a backward wants of dropout is zeros: none is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from usp.backends.library.call import How, Missing

aten = torch.ops.aten
# The efficient kernels read the LSE in vectors, and write it so: (B, H, n rounded up to this).
_LSE_ROWS = 32


class Flash:
    """``_flash_attention_*``, (B, n, H, D): flash-attn 2 inside torch, or AOTriton on ROCm.

    A window, where there is one, is said in full; where there is none nothing is said, for on ROCm
    any number is one.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor]:
        where, window = _lengths(q, k, how), _window(how)
        out, lse = aten._flash_attention_forward(
            q, k, v, *where, 0.0, how.causal, False, scale=how.scale, **window
        )[:2]
        return out, lse

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
        seed, unused = _no_dropout(q, 2, torch.uint64), _no_dropout(q, 0, torch.uint64)
        where, window = _lengths(q, k, how), _window(how)
        found: Sequence[Tensor] = aten._flash_attention_backward(
            dout, q, k, v, out, lse, *where, 0.0, how.causal, seed, unused,
            scale=how.scale, **window,
        )  # fmt: skip
        return found


class Cudnn:
    """``_scaled_dot_product_cudnn_attention``, (B, H, n, D), full and square causal."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor]:
        out, lse = aten._scaled_dot_product_cudnn_attention(
            *_heads_first(q, k, v), None, True, 0.0, how.causal, False, scale=how.scale
        )[:2]
        # (B, H, n, 1), and (B, H, n) inside
        return out.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1])

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
        seed = offset = _no_dropout(q, 0, torch.int64)
        # None is an undefined tensor; an empty one would be taken for a bias
        no_bias = no_lengths = None
        found = aten._scaled_dot_product_cudnn_attention_backward(
            *_heads_first(dout, q, k, v, out), lse.unsqueeze(-1), seed, offset, no_bias,
            no_lengths, no_lengths, q.shape[1], k.shape[1], 0.0, how.causal, scale=how.scale,
        )  # fmt: skip
        return _heads_first(*found)


class Efficient:
    """``_efficient_attention_*``, (B, n, H, D): also fp32; a key head for each query head."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor]:
        out, lse = aten._efficient_attention_forward(
            q, k, v, None, None, None, None, None, 0.0, int(how.causal), True, scale=how.scale
        )[:2]
        return out, lse.narrow(2, 0, q.shape[1])

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
        seed = offset = _no_dropout(q, 0, torch.int64)
        more = 0 if torch.version.hip else -q.shape[1] % _LSE_ROWS
        # rows that are not there: exp(score - inf) is 0
        lse = torch.nn.functional.pad(lse, (0, more), value=torch.inf)
        found: Sequence[Tensor] = aten._efficient_attention_backward(
            dout, q, k, v, None, out, None, None, q.shape[1], k.shape[1], lse, 0.0, seed, offset,
            int(how.causal), False, scale=how.scale,
        )  # fmt: skip
        return found[:3]


def _lengths(q: Tensor, k: Tensor, how: How) -> tuple[Any, ...]:
    if how.packed is None:
        return None, None, q.shape[1], k.shape[1]
    packed = how.packed
    return packed.cu_q, packed.cu_k, packed.max_q, packed.max_k


def _window(how: How) -> dict[str, int | None]:
    left, right = how.window(-1)
    return {} if left == right == -1 else {"window_size_left": left, "window_size_right": right}


def _no_dropout(q: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """A random state that nothing reads; of ``size`` numbers, or of none as a scalar."""
    return torch.zeros((size,) if size else (), dtype=dtype, device=q.device)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def missing() -> str | None:
    """They come with torch; whether for this device shows when they are loaded."""
    return None


def loader(kernel: Callable[[], Any], *ops: str) -> Callable[[], Any]:
    """Of a kernel whose ops this build of torch may lack."""

    def load() -> Any:
        for name in ops:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA"):
                raise Missing(f"this torch {torch.__version__} was built without {name} for GPUs")
        return kernel()

    return load
