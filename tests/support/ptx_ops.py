"""The GPU ops by way of the kernels' PTX: their own host code launches, ``ptx`` executes."""

from __future__ import annotations

import copy
import ctypes
import subprocess
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import ptx
from gpu_emulated import NUM_OPTIONS, GpuEmulatedOps
from gpu_launches import Launch, Launches
from torch import Tensor


def readable(names: Iterable[str]) -> dict[str, str]:
    """Mangled names by those that c++filt writes, which all anonymous namespaces share."""
    names = list(names)
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    )
    return dict(zip(done.stdout.splitlines(), names, strict=True))


def region(name: str, x: Tensor, writable: bool = True) -> ptx.Region:
    """The bytes from a tensor's first element to its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    size = (last + 1) * x.element_size() if x.numel() else 0
    if not size:  # an address, at which nothing may be touched
        return ptx.Region(name, x.data_ptr(), np.zeros(0, np.uint8), writable)
    return ptx.Region.at(name, x.data_ptr(), size, writable)


class Kernels:
    """Every kernel of some PTX files of one architecture, by its readable name.

    Attributes:
        launched: Names of those that were, in order.
    """

    def __init__(
        self, files: Iterable[Path], machine: Callable[[ptx.Memory], ptx.Machine] = ptx.Machine
    ) -> None:
        self.machine = machine
        self.entries: dict[str, ptx.Entry] = {}
        for file in files:
            found = ptx.entries(file.read_text())
            self.entries |= {name: found[mangled] for name, mangled in readable(found).items()}
        self.launched: list[str] = []

    def on(self, machine: Callable[[ptx.Memory], ptx.Machine]) -> Kernels:
        """The same kernels on another machine."""
        other = copy.copy(self)
        other.machine, other.launched = machine, []
        return other

    def edited(self, kernel: str, pattern: str, new: str, count: int = 0) -> Kernels:
        """With another text, as ``re.sub`` makes it, of each whose name has ``kernel`` in it."""
        other = copy.copy(self)
        changed = {
            name: x.edited(pattern, new, count)
            for name, x in self.entries.items()
            if kernel in name
        }
        assert changed, kernel
        other.entries, other.launched = self.entries | changed, []
        return other

    def run(
        self,
        redirected: Callable[..., AbstractContextManager[None]],
        op: Callable[..., None],
        arguments: tuple[Any, ...],
        regions: Iterable[ptx.Region],
    ) -> None:
        """Call an op of the emulated GPU; what it launches may touch the regions alone."""
        machine = self.machine(ptx.Memory(regions))

        def launch(told: Launch) -> None:
            self.launched.append(told.name)
            entry = self.entries[told.name]
            machine.launch(entry, told.arguments, told.grid, told.threads, told.shared_bytes)

        with redirected(launch):
            op(*arguments)


class PtxOps:
    """The attention ops, with their own arguments as ``GpuEmulatedOps`` has them."""

    def __init__(self, host: GpuEmulatedOps, kernels: Kernels) -> None:
        assert host.wave_size == 32
        self.host, self.kernels = host, kernels

    def attention_forward(self, *arguments: Any) -> None:
        self._run(self.host.attention_forward, arguments, read=3 + NUM_OPTIONS)

    def attention_backward(self, *arguments: Any) -> None:
        self._run(self.host.attention_backward, arguments, read=6 + NUM_OPTIONS)

    def _run(self, op: Callable[..., None], arguments: tuple[Any, ...], read: int) -> None:
        regions = [
            region(f"argument {n}", x, writable=n >= read)
            for n, x in enumerate(arguments)
            if isinstance(x, Tensor)
        ]
        self.kernels.run(self.host.redirected, op, arguments, regions)


class PtxMoves:
    """``attention_delta``, ``state_merge``, ``pack`` and ``unpack``.

    Args:
        ops: The emulated GPU's.
        library: Their file.
    """

    def __init__(self, ops: Any, library: Path, kernels: Kernels) -> None:
        self.ops, self.kernels = ops, kernels
        self._launches = Launches(ctypes.CDLL(str(library)), library)

    def attention_delta(self, dout: Tensor, out: Tensor, delta: Tensor) -> None:
        self._run(self.ops.attention_delta, (dout, out, delta), [dout, out], [delta])

    def state_merge(self, out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
        arguments = (out, lse, more_out, more_lse)
        self._run(self.ops.state_merge, arguments, [more_out, more_lse], [out, lse])

    def pack(self, tensors: Sequence[Tensor], message: Tensor) -> None:
        self._run(self.ops.pack, (tensors, message), tensors, [message])

    def unpack(self, message: Tensor, tensors: Sequence[Tensor]) -> None:
        self._run(self.ops.unpack, (message, tensors), [message], tensors)

    def _run(
        self,
        op: Callable[..., None],
        arguments: tuple[Any, ...],
        read: Sequence[Tensor],
        written: Sequence[Tensor],
    ) -> None:
        regions = [region("an input", x, writable=False) for x in read]
        regions += [region("a result", x) for x in written]
        self.kernels.run(self._launches.redirected, op, arguments, regions)
