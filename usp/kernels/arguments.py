"""What kernels are given: tensors as pointer and strides, options that are off as None.

Triton compiles a kernel anew for each pattern of None, so what is off costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
# A tile spans at most 256 rows: from this row stride on, offsets inside it need 64 bits.
_WIDE_STRIDE = 2**31 // 256


class TensorView(NamedTuple):
    """(B, L, H, X) tensor, last dim contiguous; strides in elements."""

    ptr: Any
    batch: int
    row: int
    head: int


class KernelSpan(NamedTuple):
    """Visible interval of each row, (L,) int32 both."""

    first: Tensor
    stop: Tensor


class BiasView(NamedTuple):
    """(B, H, Lq, Lk) with strides 0 where broadcast; ``row`` None where all rows share one."""

    ptr: Any
    batch: int
    head: int
    row: int | None
    key: int


class Alibi(NamedTuple):
    """(B, H) slopes and the positions of rows and keys."""

    ptr: Any
    batch: int
    head: int


class Dropout(NamedTuple):
    """Keep where a random word reaches ``threshold`` (the bits of a uint32), times ``factor``."""

    threshold: int
    factor: float
    num_heads: int
    head_offset: int


class KernelScoring(NamedTuple):
    """How scores are made, in units of log 2.

    ``scale`` is the factor of <q, k>: for the score itself, or with ``softcap`` for the argument
    of tanh, whose factor ``softcap`` then is.
    """

    scale: float
    softcap: float | None
    bias: BiasView | None
    alibi: Alibi | None
    dropout: Dropout | None
    q_pos: Tensor | None
    k_pos: Tensor | None


class Sizes(NamedTuple):
    """Lengths and heads; query head h reads key head (h + shift) // group.

    What programs of ``together`` sequences (heads of a batch entry) walk over fits a cache.
    """

    q_len: int
    k_len: int
    num_heads: int
    num_kv_heads: int
    shift: int
    group: int
    together: int


@dataclass(frozen=True, eq=False)
class KernelOptions:
    """What forward and backward share besides q, k, v; order and meaning as in docs/contract.md.

    Attributes:
        first, stop: (Lq,) int32 or both None.
        bias: (B|1, H|1, Lq|1, Lk) fp32 or None.
        alibi_slopes: (B|1, H) fp32 or None.
        q_pos, k_pos: (Lq,), (Lk,) int32; there with alibi_slopes or dropout.
        head_offset, num_heads, group_size: Of the whole attention's heads.
    """

    first: Tensor | None
    stop: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    q_pos: Tensor | None
    k_pos: Tensor | None
    head_offset: int
    num_heads: int
    group_size: int
    softmax_scale: float
    softcap: float
    dropout_p: float
    dropout_seed: int

    @property
    def span(self) -> KernelSpan | None:
        if self.first is None or self.stop is None:
            return None
        return KernelSpan(self.first.contiguous(), self.stop.contiguous())

    @property
    def scoring(self) -> KernelScoring:
        scale, softcap = self.softmax_scale * LOG2E, None
        if self.softcap:
            scale, softcap = self.softmax_scale / self.softcap, self.softcap * LOG2E
        alibi = None
        if self.alibi_slopes is not None:
            slopes = self.alibi_slopes
            alibi = Alibi(slopes, slopes.stride(0) * (slopes.shape[0] > 1), slopes.stride(1))
        dropout = None
        if self.dropout_p:
            threshold, factor = _signed(int(self.dropout_p * 2**32)), 1 / (1 - self.dropout_p)
            dropout = Dropout(threshold, factor, self.num_heads, self.head_offset)
        bias = None if self.bias is None else bias_view_of(self.bias)
        return KernelScoring(scale, softcap, bias, alibi, dropout, self.q_pos, self.k_pos)

    @property
    def folded(self) -> bool:
        """Whether a score is just scale * <q, k> with a positive scale, order kept."""
        plain = not self.softcap and self.bias is None and self.alibi_slopes is None
        return plain and self.softmax_scale > 0

    @property
    def seeds(self) -> tuple[int, int]:
        """Low and high half of the seed, as signed 32-bit integers."""
        return _signed(self.dropout_seed), _signed(self.dropout_seed >> 32)

    def sizes(self, q: Tensor, k: Tensor, v: Tensor) -> Sizes:
        """For programs that own rows and walk over keys; heads that share them stay together."""
        return self._sizes(q, k, q, self._fitting(k, v) * self.group_size)

    def key_sizes(self, dout: Tensor, q: Tensor, k: Tensor) -> Sizes:
        """For programs that own keys and walk over the rows of all heads that share them."""
        return self._sizes(q, k, k, self._fitting(q, dout, self.group_size))

    def _sizes(self, q: Tensor, k: Tensor, own: Tensor, together: int) -> Sizes:
        shift, together = (
            self.head_offset % self.group_size,
            min(together, own.shape[0] * own.shape[2]),
        )
        return Sizes(
            q.shape[1], k.shape[1], q.shape[2], k.shape[2], shift, self.group_size, together
        )

    def _fitting(self, x: Tensor, y: Tensor, heads: int = 1) -> int:
        """Of how many sequences a cache holds so many heads each of two tensors."""
        if self.first is None:  # all tiles take equally long
            return 1
        size = x.shape[1] * (x.shape[3] + y.shape[3]) * x.element_size() * heads
        return max(1, _cached_bytes(x.device) // max(1, size))


@dataclass(frozen=True, eq=False)
class BackwardInputs:
    """What a backward starts from.

    Attributes:
        dout: (B, Lq, H, Dv). q: (B, Lq, H, D). k: (B, Lk, G, D). v: (B, Lk, G, Dv). One dtype,
            fp32, bf16 or fp16, last dim contiguous.
        delta, lse: (B, H, Lq) fp32, last dim contiguous.
    """

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    delta: Tensor
    lse: Tensor

    @property
    def vectors(self) -> tuple[Any, ...]:
        """lse and delta with their batch and head strides."""
        return self.lse, self.delta, *self.lse.stride()[:2], *self.delta.stride()[:2]

    @property
    def wide(self) -> bool:
        return is_wide(self.dout, self.q, self.k, self.v)

    @property
    def dims(self) -> dict[str, int]:
        head_dim, value_dim = self.q.shape[-1], self.v.shape[-1]
        return {
            "D": head_dim,
            "BLOCK_D": padded(head_dim),
            "DV": value_dim,
            "BLOCK_DV": padded(value_dim),
        }


@cache
def _cached_bytes(device: torch.device) -> int:
    """What programs that run side by side may read of the L2: the rest is for what they write.

    Source:
        FlashAttention-3 counts on 32 of Hopper's 50 MiB (hopper/tile_scheduler.hpp).
    """
    if device.type != "cuda" or not torch.cuda.is_available():  # interpreted, or a fake tensor
        return 2**16
    return torch.cuda.get_device_properties(device).L2_cache_size * 5 // 8


def view_of(x: Tensor) -> TensorView:
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"the last dim must be contiguous, its stride is {x.stride(-1)}")
    return TensorView(x, x.stride(0), x.stride(1), x.stride(2))


def bias_view_of(x: Tensor) -> BiasView:
    batch, head, row, key = (
        stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape, strict=True)
    )
    return BiasView(x, batch, head, row if x.shape[2] > 1 else None, key)


def is_wide(*tensors: Tensor) -> bool:
    """Whether offsets inside a tile of rows pass 31 bits."""
    return any(x.stride(1) >= _WIDE_STRIDE for x in tensors)


def padded(head_dim: int) -> int:
    """The power of two a tile is padded to; matrix instructions want at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word
