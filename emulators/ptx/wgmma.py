"""What wgmma.mma_async reads and writes: operands in shared memory and fragments in registers.

Source: PTX ISA 9.0, section 9.7.15.5, "Asynchronous wgmma.mma_async": "Register Fragments and
Shared Memory Matrix Layouts", "Shared Memory Matrix Layout", "Strides", "Matrix Descriptor Format".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

ROWS, DEPTH = 64, 16  # of one product of 16-bit numbers
_CHUNK = 16  # bytes: the element that layouts are given in
# bits 62 and 63: bytes of a row of the swizzled pattern
_SWIZZLES = {0: _CHUNK, 1: 128, 2: 64, 3: 32}


@dataclass(frozen=True)
class Descriptor:
    """A matrix in shared memory; all in bytes. A ``row`` of 16 means that nothing is swizzled."""

    start: int
    leading: int
    stride: int
    row: int

    @classmethod
    def decode(cls, bits: int) -> Descriptor:
        """Raises ValueError where bits are set that have no meaning here."""

        def field(low: int) -> int:
            return ((bits >> low) & 0x3FFF) << 4

        row = _SWIZZLES[bits >> 62]
        unknown = bits & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 3 << 62)
        if unknown:  # a base offset among them, which nothing here needs
            raise ValueError(f"bits {unknown:#x} of matrix descriptor {bits:#018x}")
        start = field(0)
        # the pattern begins where its rows times 8 do, as there is no base offset
        if row > _CHUNK and (start >> 7) & (row // 16 - 1):
            raise ValueError(f"matrix at {start:#x}: off the start of a {row}-byte pattern")
        return cls(start, field(16), field(32), row)

    def addresses(self, extent: int, mn_major: bool) -> Array:
        """(extent, 16) addresses of 16-bit numbers, by row or column (m or n) and by k."""
        mn, k = np.arange(extent)[:, None], np.arange(DEPTH)[None, :]
        return swizzled(self.start + self._offsets(mn, k, mn_major), self.row)

    def _offsets(self, mn: Array, k: Array, mn_major: bool) -> Array:
        if not mn_major:
            along = k * 2 if self.row > _CHUNK else k % 8 * 2 + k // 8 * self.leading
            return along + mn % 8 * self.row + mn // 8 * self.stride
        wide = self.row // 2  # numbers
        across, along = mn // wide, k // 8
        if self.row > _CHUNK:
            return mn % wide * 2 + across * self.leading + k % 8 * self.row + along * self.stride
        return mn % 8 * 2 + across * self.stride + k % 8 * _CHUNK + along * self.leading


def swizzled(address: Array, row: int) -> Array:
    """16-byte chunks change places: their number in a row is xor-ed with that of the row."""
    return address ^ ((address >> 7) & (row // _CHUNK - 1)) << 4


def left_fragment() -> tuple[Array, Array]:
    """(128 threads, 8 numbers) rows and columns of A in registers, two numbers in each."""
    thread, i = np.arange(128)[:, None], np.arange(8)[None, :]
    row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    return row, thread % 4 * 2 + i % 2 + i // 4 * 8


def sum_fragment(columns: int) -> tuple[Array, Array]:
    """(128 threads, columns / 2 registers) rows and columns of D in fp32."""
    thread, i = np.arange(128)[:, None], np.arange(columns // 2)[None, :]
    row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    return row, i // 4 * 8 + thread % 4 * 2 + i % 2


def widened(bits: Array, kind: str) -> Array:
    """16-bit numbers, as uint16, in fp32."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    assert kind == "f16", kind
    return bits.view(np.float16).astype(np.float32)
