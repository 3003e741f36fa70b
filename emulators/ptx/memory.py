"""Memory that a kernel may touch: nothing outside of it, and nothing that is not aligned.

Source: PTX ISA, "State Spaces" and "Addresses as Operands": an access is aligned to its width, a
vector's to the whole vector.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np

from .parse import Refused
from .races import Watch
from .registers import Array

Type = np.dtype[Any]
# Where the other spaces lie among generic addresses; real ones are below 2^48.
SHARED_WINDOW, PARAM_WINDOW = 1 << 56, 1 << 57


class Region:
    """Bytes at addresses of their own.

    Attributes:
        watch: Looks for races, or None.
    """

    def __init__(self, name: str, base: int, data: Array, writable: bool = True) -> None:
        self.name, self.base, self.data, self.writable = name, base, data, writable
        self.size = data.size
        self.watch: Watch | None = None
        self._views: dict[Type, tuple[Array, int]] = {}

    @classmethod
    def at(cls, name: str, base: int, size: int, writable: bool = True) -> Region:
        """Memory of this process."""
        buffer = (ctypes.c_uint8 * size).from_address(base)
        return cls(name, base, np.frombuffer(buffer, np.uint8), writable)

    def _view(self, dtype: Type) -> tuple[Array, int]:
        """Its aligned elements, and how far behind the base the first is."""
        if dtype not in self._views:
            skipped = -self.base % dtype.itemsize
            end = self.size - (self.size - skipped) % dtype.itemsize
            self._views[dtype] = self.data[skipped:end].view(dtype), skipped
        return self._views[dtype]

    def holds(self, low: int, high: int) -> bool:
        """Whether all bytes from ``low`` to ``high``, which is not one of them, lie here."""
        return self.base <= low and high <= self.base + self.size

    def offsets(self, addresses: Array, width: int) -> Array:
        """Bytes behind the base, once it is sure that they may be accessed."""
        if len(addresses):
            low, high = int(addresses.min()), int(addresses.max())
            if not self.holds(low, high + width):
                wrong = (low if low < self.base else high) - self.base
                where = f"{wrong:+} from {self.name} of {self.size} bytes"
                raise Refused(f"{width} bytes are outside of what there is: {where}")
        return self._aligned(addresses, width)

    def reserve(self, addresses: Array, width: int) -> None:
        """What will be written at some time from now on."""
        offsets = self.offsets(addresses, width)
        if self.watch is not None:
            self.watch.note(offsets, width, writes=True)

    def _aligned(self, addresses: Array, width: int) -> Array:
        if width > 1 and int(np.bitwise_or.reduce(addresses)) & (width - 1):
            raise Refused(f"an address in {self.name} is not aligned to {width} bytes")
        return addresses - self.base

    def _indices(
        self, addresses: Array, dtype: Type, count: int, inside: bool, writes: bool
    ) -> tuple[Array, Array]:
        width = dtype.itemsize * count
        offsets = (self._aligned if inside else self.offsets)(addresses, width)
        if self.watch is not None:
            self.watch.note(offsets, width, writes)
        elements, skipped = self._view(dtype)
        return elements, (offsets - skipped) // dtype.itemsize

    def read(
        self, addresses: Array, dtype: Type, count: int = 1, inside: bool = False
    ) -> list[Array]:
        """``count`` neighbours at each address, one array for each of them.

        Args:
            addresses: int64.
            inside: Whether it is known that they lie here.
        """
        elements, indices = self._indices(addresses, dtype, count, inside, False)
        return [elements[indices + n if n else indices] for n in range(count)]

    def write(self, addresses: Array, values: list[Array], inside: bool = False) -> None:
        if not self.writable:
            raise Refused(f"a write to {self.name}, which is only read")
        elements, indices = self._indices(addresses, values[0].dtype, len(values), inside, True)
        for n, value in enumerate(values):
            elements[indices + n] = value


class Memory:
    """Global memory: the tensors that a kernel may touch, at their real addresses."""

    name = "global memory"

    def __init__(self, regions: Iterable[Region] = ()) -> None:
        self.regions: list[Region] = []
        self._bases: list[int] = []
        for region in regions:
            self.add(region)

    def add(self, region: Region) -> None:
        at = bisect.bisect_left(self._bases, region.base)
        self._bases.insert(at, region.base)
        self.regions.insert(at, region)

    def turn(self, block: int, launch: int) -> None:
        """Tell who looks for races whose accesses follow."""
        for region in self.regions:
            if region.watch is not None:
                region.watch.who, region.watch.epoch = block, launch

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
        """The tensor in which all of it lies, if that is one."""
        if not len(addresses):
            return self.regions[0] if self.regions else None
        low, high = int(addresses.min()), int(addresses.max())
        at = bisect.bisect_right(self._bases, low) - 1
        found = at >= 0 and self.regions[at].holds(low, high + width)
        return self.regions[at] if found else None

    def check(self, addresses: Array, width: int) -> None:
        """What will be read at some time from now on."""
        one = self._one(addresses, width)
        parts = self._split(addresses, width) if one is None else [(one, slice(None))]
        for region, inside in parts:
            region.offsets(addresses[inside], width)

    def read(self, addresses: Array, dtype: Type, count: int = 1) -> list[Array]:
        width = dtype.itemsize * count
        one = self._one(addresses, width)
        if one is not None:
            return one.read(addresses, dtype, count, inside=True)
        results = [np.empty(len(addresses), dtype) for _ in range(count)]
        for region, inside in self._split(addresses, width):
            parts = region.read(addresses[inside], dtype, count, inside=True)
            for result, part in zip(results, parts, strict=True):
                result[inside] = part
        return results

    def write(self, addresses: Array, values: list[Array]) -> None:
        width = values[0].dtype.itemsize * len(values)
        one = self._one(addresses, width)
        if one is not None:
            return one.write(addresses, values, inside=True)
        for region, inside in self._split(addresses, width):
            region.write(addresses[inside], [value[inside] for value in values], inside=True)
