"""The bytes that a kernel may touch: those of given tensors, and its LDS. Anything else raises."""

from __future__ import annotations

import bisect
import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .wave import Hazard

Bytes = NDArray[np.uint8]
Addresses = NDArray[np.int64]


@dataclass
class _Region:
    """A run of memory with, for each byte, whether it may be read and written."""

    start: int
    bytes: Bytes
    readable: NDArray[np.bool_]
    writable: NDArray[np.bool_]

    @property
    def stop(self) -> int:
        return self.start + len(self.bytes)


class Memory:
    """Global memory by real addresses."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []
        self._starts: list[int] = []

    def allow(self, x: torch.Tensor, *, writable: bool = False) -> None:
        """The elements of a tensor, and not what lies between them."""
        storage = x.untyped_storage()
        if not x.numel():
            return
        region = self._region(storage.data_ptr(), storage.nbytes())
        size = x.element_size()
        elements = torch.zeros(storage.nbytes() // size, dtype=torch.bool)
        elements.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
        touched = elements.numpy().repeat(size)
        region.readable[: len(touched)] |= touched
        if writable:
            region.writable[: len(touched)] |= touched

    def allow_bytes(self, content: Bytes) -> int:
        """To be read; returns its address. The caller keeps it alive."""
        region = self._region(content.ctypes.data, len(content))
        region.readable[:] = True
        return region.start

    def _region(self, start: int, size: int) -> _Region:
        at = bisect.bisect_left(self._starts, start)
        if at < len(self._starts) and self._starts[at] == start:
            return self._regions[at]
        content = np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)
        region = _Region(start, content, np.zeros(size, np.bool_), np.zeros(size, np.bool_))
        self._regions.insert(at, region)
        self._starts.insert(at, start)
        return region

    def read(self, addresses: Addresses, size: int) -> Bytes:
        """(addresses, size), aligned to the size of a number of up to 4 bytes."""
        found = np.empty((len(addresses), size), np.uint8)
        for region, which, places in self._places(addresses, size):
            if not region.readable[places].all():
                raise Hazard(f"reads between the elements of a tensor at {region.start:#x}")
            found[which] = region.bytes[places]
        return found

    def write(self, addresses: Addresses, content: Bytes) -> None:
        for region, which, places in self._places(addresses, content.shape[1]):
            if not region.writable[places].all():
                raise Hazard(f"writes what it may not at {region.start:#x}")
            region.bytes[places] = content[which]

    def _places(self, addresses: Addresses, size: int):  # type: ignore[no-untyped-def]
        """For each region in use: which addresses, and its bytes for each of them."""
        _assert_aligned(addresses, min(size, 4))
        owners = np.searchsorted(self._starts, addresses, side="right") - 1
        for owner in np.unique(owners):
            which = np.flatnonzero(owners == owner)
            low, high = int(addresses[which].min()), int(addresses[which].max())
            region = self._regions[owner]
            if owner < 0 or high + size > region.stop:
                raise Hazard(f"touches {size} bytes at {low:#x} to {high:#x}, of no tensor")
            places = (addresses[which] - region.start)[:, None] + np.arange(size)
            yield region, which, places


class Lds:
    """A workgroup's local memory. What nobody has written is NaN in every format."""

    def __init__(self, size: int) -> None:
        self._bytes = np.full(size, 0xFF, np.uint8)

    def read(self, addresses: Addresses, size: int) -> Bytes:
        return self._bytes[self._places(addresses, size)]

    def write(self, addresses: Addresses, content: Bytes) -> None:
        self._bytes[self._places(addresses, content.shape[1])] = content

    def _places(self, addresses: Addresses, size: int) -> NDArray[np.int64]:
        _assert_aligned(addresses, size)
        if len(addresses) and (addresses.min() < 0 or addresses.max() + size > len(self._bytes)):
            raise Hazard(
                f"touches {size} bytes of LDS at {addresses.min()} to {addresses.max()}, "
                f"of {len(self._bytes)}"
            )
        return addresses[:, None] + np.arange(size)


def _assert_aligned(addresses: Addresses, size: int) -> None:
    if (addresses % size).any():
        raise Hazard(f"{size} bytes at {addresses[addresses % size != 0][0]:#x}, not aligned")
