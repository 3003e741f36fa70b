"""Tensor maps, and the boxes that cp.async.bulk.tensor copies by them.

Source: PTX ISA 9.0, section 5.5, "Tensors"; CUDA driver API, "Tensor Map Object Management".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from .wgmma import Array, swizzled

BYTES = 128
_MARK = b"tensor map here\n"


@dataclass(frozen=True)
class TensorMap:
    """A tensor of 16-bit numbers in global memory; innermost dim first.

    Attributes:
        base: Address.
        sizes: Numbers along each dim.
        strides: Bytes from one to the next, of all dims but the first, which is contiguous.
        box: Numbers of a box along each dim.
        row: Bytes of a row that the swizzle permutes; 16 is none.
    """

    base: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    row: int

    def __post_init__(self) -> None:
        """What cuTensorMapEncodeTiled demands."""
        rank = len(self.sizes)
        assert len(self.box) == rank == len(self.strides) + 1 and 1 <= rank <= 5
        self._demand("address", self.base % 16 == 0, self.base)
        self._demand("sizes", all(0 < n <= 2**32 for n in self.sizes), self.sizes)
        legal = all(0 < n < 2**40 and n % 16 == 0 for n in self.strides)
        self._demand("strides", legal, self.strides)
        self._demand("box", all(0 < n <= 256 for n in self.box), self.box)
        inner = self.box[0] * 2
        self._demand("box row", inner % 16 == 0 and (self.row == 16 or inner <= self.row), inner)

    @staticmethod
    def _demand(what: str, legal: bool, found: Any) -> None:
        if not legal:
            raise ValueError(f"a tensor map's {what}: {found}")

    @property
    def bytes(self) -> int:
        return 2 * int(np.prod(self.box))

    def source(self, first: tuple[int, ...]) -> tuple[Array, Array]:
        """Addresses of a box's numbers, rows of the box last but one, and which are inside."""
        rank = len(self.sizes)
        address, inside = np.int64(self.base), np.bool_(True)
        for dim, (start, extent) in enumerate(zip(first, self.box, strict=True)):
            at = (start + np.arange(extent)).reshape(-1, *[1] * dim)
            address = address + at * (self.strides[dim - 1] if dim else 2)
            inside = inside & (at >= 0) & (at < self.sizes[dim])
        shape = tuple(reversed(self.box))
        assert address.ndim == rank
        return np.broadcast_to(address, shape), np.broadcast_to(inside, shape)

    def target(self, start: int) -> Array:
        """Addresses in shared memory that the box's numbers come to."""
        if start % 128:
            raise ValueError(f"a box is copied to {start:#x}, which 128 does not divide")
        return swizzled(start + 2 * np.arange(self.bytes // 2), self.row).reshape(self.box[::-1])

    def packed(self) -> bytes:
        """As a kernel's parameter."""
        rank = len(self.sizes)
        head = struct.pack("<QII", self.base, rank, self.row)
        # sizes up to 2 ** 32 do not fit 4 bytes
        body = struct.pack(
            f"<{rank}Q{rank - 1}Q{rank}B", *self.sizes, *self.strides, *[n - 1 for n in self.box]
        )
        return (_MARK + head + body).ljust(BYTES, b"\0")


def unpacked(blob: bytes) -> TensorMap:
    """What ``packed`` has made."""
    if blob[: len(_MARK)] != _MARK:
        raise ValueError("what lies there is no tensor map")
    at = len(_MARK)
    base, rank, row = struct.unpack_from("<QII", blob, at)
    numbers = struct.unpack_from(f"<{rank}Q{rank - 1}Q{rank}B", blob, at + 16)
    sizes, strides = numbers[:rank], numbers[rank : 2 * rank - 1]
    return TensorMap(base, sizes, strides, tuple(n + 1 for n in numbers[2 * rank - 1 :]), row)
