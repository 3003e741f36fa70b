"""Many strided (B, L, H, X) pieces into a flat message or out of it, all of them in one launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from usp.kernels.arguments import cdiv

_UNITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
_BLOCK_ELEMENTS = 2048
_FIELDS = 11


def copy_pieces(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy ``sources[n]`` to ``targets[n]``, all pieces in one launch.

    Args:
        sources, targets: (B, L, H, X) pieces, of one X and dtype, last dim contiguous: parts of one
            tensor, and of one message.
    """
    pairs = [(s, t) for s, t in zip(sources, targets, strict=True) if s.numel()]
    if not pairs:
        return
    size, width = pairs[0][0].element_size(), pairs[0][0].shape[3]
    bases = [min(pair[side].data_ptr() for pair in pairs) for side in (0, 1)]
    pieces = tuple(
        (
            source.data_ptr() - bases[0],
            target.data_ptr() - bases[1],
            *source.shape[:3],
            *_byte_strides(source),
            *_byte_strides(target),
        )
        for source, target in pairs
    )
    unit = gcd(8, width * size, *bases, *(n for piece in pieces for n in (*piece[:2], *piece[5:])))
    width = width * size // unit
    block_x = 1 << (width - 1).bit_length()
    block = max(1, _BLOCK_ELEMENTS // block_x)
    rows = max(piece[2] * piece[3] * piece[4] for piece in pieces)
    first = [min((pair[side] for pair in pairs), key=Tensor.data_ptr) for side in (0, 1)]
    copy_kernel[(cdiv(rows, block), len(pieces))](
        # The storage may not divide into units, but the kernel only wants the address.
        *(triton.reinterpret(tensor, _UNITS[unit]) for tensor in first),
        _table(pieces, unit, pairs[0][0].device),
        X=width,
        BLOCK_X=block_x,
        BLOCK=block,
        FIELDS=_FIELDS,
        num_warps=4,
    )


def _byte_strides(piece: Tensor) -> Iterator[int]:
    """Of all dims but the last; 0 where a dim's stride means nothing."""
    for stride, size in zip(piece.stride()[:3], piece.shape[:3], strict=True):
        yield stride * piece.element_size() if size > 1 else 0


@lru_cache(maxsize=256)
def _table(pieces: tuple[tuple[int, ...], ...], unit: int, device: torch.device) -> Tensor:
    """(pieces, fields) int64: both offsets, three sizes, two times three strides, in units."""
    rows = [[*(n // unit for n in p[:2]), *p[2:5], *(n // unit for n in p[5:])] for p in pieces]
    return torch.tensor(rows, dtype=torch.int64, device=device)


@triton.jit
def copy_kernel(
    source,
    target,
    table,
    X: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
):
    piece = table + tl.program_id(1) * FIELDS
    lengths = tl.load(piece + 3)
    heads = tl.load(piece + 4)
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b = row // (lengths * heads)
    i = row // heads % lengths
    h = row % heads
    come_from = tl.load(piece) + b * tl.load(piece + 5)
    come_from += i * tl.load(piece + 6) + h * tl.load(piece + 7)
    go_to = tl.load(piece + 1) + b * tl.load(piece + 8)
    go_to += i * tl.load(piece + 9) + h * tl.load(piece + 10)
    x = tl.arange(0, BLOCK_X)
    inside = (row < tl.load(piece + 2) * lengths * heads)[:, None] & (x < X)[None, :]
    moved = tl.load(source + come_from[:, None] + x[None, :], mask=inside)
    tl.store(target + go_to[:, None] + x[None, :], moved, mask=inside)
