"""What a block of sm_90a has that runs on by itself.

Source: PTX ISA 9.0, "Async proxy" in section 8, "Memory Consistency Model".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import numpy as np

from .machine import Block
from .mbarrier import Barriers
from .memory import Region
from .parse import Refused
from .registers import Array


class SharedMemory(Region):
    """Knows which ordinary stores are not yet ordered before accesses by other proxies.

    They are once their threads have run a fence, or after one of who comes to access: the model
    asks for a fence on the way from the one to the other.

    Attributes:
        who: Who runs now, from 1 on.
    """

    def __init__(self, region: Region) -> None:
        super().__init__(region.name, region.base, region.data)
        self.who = self._time = 0
        self._written = np.zeros(region.size, np.int64)  # when; 0 is ordered before all
        self._writer = np.zeros(region.size, np.int16)
        self._fenced: dict[int, int] = {}  # when, by whom

    def write(self, addresses: Array, values: list[Array]) -> None:
        super().write(addresses, values)
        width = values[0].dtype.itemsize * len(values)
        offsets = (addresses.astype(np.int64) - self.base)[:, None] + np.arange(width)
        self._time += 1
        self._written[offsets], self._writer[offsets] = self._time, self.who

    def fence(self) -> None:
        """Of who runs now."""
        self._written[self._writer == self.who] = 0
        self._fenced[self.who] = self._time

    def write_asynchronously(self, addresses: Array, values: Array) -> None:
        super().write(addresses, [values])

    def read_asynchronously(self, addresses: Array, dtype: np.dtype) -> Array:
        (found,) = self.read(addresses, dtype)
        if (self._written[addresses - self.base] > self._fenced.get(self.who, 0)).any():
            raise Refused("stores to shared memory that no fence.proxy.async orders before this")
        return found


@dataclass
class Asynchronous:
    """Of one block.

    Attributes:
        late_copies, late_products: Whether what runs on by itself is done as late as it may be, or
            at once.
        owned: Registers of a thread of each warp.
        free: Registers that nobody has.
        products: What is running, by the first thread of a frame.
    """

    late_copies: bool
    late_products: bool
    shared: SharedMemory
    owned: dict[int, int]
    free: int = 0
    barriers: Barriers = field(default_factory=Barriers)
    products: dict[int, object] = field(default_factory=dict)


def asynchronous(block: Block) -> Asynchronous:
    return cast(Asynchronous, block.state["asynchronous"])
