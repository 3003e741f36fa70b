"""The GPU ops by way of the kernels' PTX: their own host code launches, ``ptx`` executes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import ptx
from gpu_host import GpuHostOps
from gpu_launches import Launch
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


class PtxOps:
    """Has the ops' own arguments, as ``GpuHostOps`` has; takes NVIDIA's tiles.

    Args:
        files: PTX files, one architecture's.
        settings: Of ``ptx.Machine``.

    Attributes:
        launched: Names of the kernels that were, in order.
    """

    def __init__(self, host: GpuHostOps, files: Iterable[Path], **settings: Any) -> None:
        assert host.wave_size == 32
        self.host, self.settings = host, settings
        self.kernels: dict[str, ptx.Entry] = {}
        for file in files:
            entries = ptx.entries(file.read_text())
            self.kernels |= {name: entries[m] for name, m in readable(entries).items()}
        self.launched: list[str] = []

    def attention_forward(self, *arguments: Any) -> None:
        self._run(self.host.attention_forward, arguments, written=3)

    def attention_backward(self, *arguments: Any) -> None:
        self._run(self.host.attention_backward, arguments, written=4)

    def _run(self, op: Callable[..., None], arguments: tuple[Any, ...], written: int) -> None:
        tensors = {n: x for n, x in enumerate(arguments) if isinstance(x, Tensor)}
        first_written = len(arguments) - written
        regions = [
            region(f"argument {n}", x, writable=n >= first_written) for n, x in tensors.items()
        ]
        machine = ptx.Machine(ptx.Memory(regions), **self.settings)

        def run(launch: Launch) -> None:
            self.launched.append(launch.name)
            entry = self.kernels[launch.name]
            machine.launch(
                entry, launch.arguments, launch.grid, launch.threads, launch.shared_bytes
            )

        with self.host.redirected(run):
            op(*arguments)
