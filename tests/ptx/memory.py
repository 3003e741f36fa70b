"""Memory that a kernel may touch: nothing outside of it, and nothing that is not aligned.

Source: PTX ISA, "State Spaces" and "Addresses as Operands": an access is aligned to its width, a
vector's to the whole vector.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np

from .parse import Refused
from .registers import Array

# Where the other spaces lie among generic addresses; real ones are below 2^48.
SHARED_WINDOW, PARAM_WINDOW = 1 << 56, 1 << 57


class Region:
    """Bytes at addresses of their own."""

    def __init__(self, name: str, base: int, data: Array, writable: bool = True) -> None:
        self.name, self.base, self.data, self.writable = name, base, data, writable
        self.size = data.size
        self._views: dict[np.dtype, tuple[Array, int]] = {}

    @classmethod
    def at(cls, name: str, base: int, size: int, writable: bool = True) -> Region:
        """Memory of this process."""
        buffer = (ctypes.c_uint8 * size).from_address(base)
        return cls(name, base, np.frombuffer(buffer, np.uint8), writable)

    def _view(self, dtype: np.dtype) -> tuple[Array, int]:
        """Its aligned elements, and how far behind the base the first is."""
        if dtype not in self._views:
            skipped = -self.base % dtype.itemsize
            end = self.size - (self.size - skipped) % dtype.itemsize
            self._views[dtype] = self.data[skipped:end].view(dtype), skipped
        return self._views[dtype]

    def offsets(self, addresses: Array, width: int) -> Array:
        """Bytes behind the base, once it is sure that they may be accessed."""
        offsets = addresses.astype(np.int64) - self.base
        if not len(offsets):
            return offsets
        low, high = int(offsets.min()), int(offsets.max())
        if low < 0 or high + width > self.size:
            wrong = low if low < 0 else high
            raise Refused(
                f"{width} bytes at {wrong:+#x} are outside of {self.name} of {self.size} bytes"
            )
        if width > 1 and int(np.bitwise_or.reduce(offsets + self.base)) & (width - 1):
            raise Refused(f"an address in {self.name} is not aligned to {width} bytes")
        return offsets

    def read(self, addresses: Array, dtype: np.dtype, count: int = 1) -> list[Array]:
        """``count`` neighbours at each address, one array for each of them."""
        offsets = self.offsets(addresses, dtype.itemsize * count)
        elements, skipped = self._view(dtype)
        indices = (offsets - skipped) // dtype.itemsize
        return [elements[indices + n if n else indices] for n in range(count)]

    def write(self, addresses: Array, values: list[Array]) -> None:
        if not self.writable:
            raise Refused(f"a write to {self.name}, which is only read")
        dtype = values[0].dtype
        offsets = self.offsets(addresses, dtype.itemsize * len(values))
        elements, skipped = self._view(dtype)
        indices = (offsets - skipped) // dtype.itemsize
        for n, value in enumerate(values):
            elements[indices + n] = value


class Memory:
    """Global memory: the tensors that a kernel may touch, at their real addresses."""

    name = "global memory"

    def __init__(self, regions: Iterable[Region] = ()) -> None:
        self.regions = list(regions)
        self._last = self.regions[0] if self.regions else None

    def add(self, region: Region) -> None:
        self.regions.append(region)
        self._last = region

    def _split(self, addresses: Array, width: int) -> list[tuple[Region, Array]]:
        """Which addresses lie in which tensor."""
        found, left = [], np.ones(len(addresses), np.bool_)
        for region in self.regions:
            inside = left & (addresses >= region.base)
            inside &= addresses + width <= region.base + region.size
            if inside.any():
                found.append((region, inside))
                left &= ~inside
        if left.any():
            wrong = int(addresses[left][0])
            raise Refused(f"{width} bytes at {wrong:#x} are in no tensor: {self._nearest(wrong)}")
        return found

    def _nearest(self, address: int) -> str:
        if not self.regions:
            return "there is none"

        def distance(region: Region) -> int:
            return max(region.base - address, address - region.base - region.size + 1)

        region = min(self.regions, key=distance)
        return f"{address - region.base:+} from {region.name} of {region.size} bytes"

    def _one(self, addresses: Array, width: int) -> Region | None:
        """The tensor of the last access where all lies in it again."""
        region = self._last
        if region is None or not len(addresses):
            return region
        low, high = int(addresses.min()), int(addresses.max())
        inside = region.base <= low and high + width <= region.base + region.size
        return region if inside else None

    def read(self, addresses: Array, dtype: np.dtype, count: int = 1) -> list[Array]:
        width = dtype.itemsize * count
        one = self._one(addresses, width)
        if one is not None:
            return one.read(addresses, dtype, count)
        results = [np.empty(len(addresses), dtype) for _ in range(count)]
        for region, inside in self._split(addresses, width):
            for result, part in zip(
                results, region.read(addresses[inside], dtype, count), strict=True
            ):
                result[inside] = part
            self._last = region
        return results

    def write(self, addresses: Array, values: list[Array]) -> None:
        width = values[0].dtype.itemsize * len(values)
        one = self._one(addresses, width)
        if one is not None:
            one.write(addresses, values)
            return
        for region, inside in self._split(addresses, width):
            region.write(addresses[inside], [value[inside] for value in values])
            self._last = region
