"""The ops of a build for AMD, run by the interpreter as the kernels' own host code asks."""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from gcn.assembly import Assembly, Kernel
from gcn.machine import Launchable, Order
from gcn.memory import Memory
from gpu_emulated import GpuEmulatedOps
from gpu_launches import Launch, Launches
from torch import Tensor

Redirect = Callable[[Callable[[Launch], None]], AbstractContextManager[None]]


class Programs:
    """The kernels of one target, decoded when they are first launched.

    Args:
        edit: Changes a kernel before that.

    Attributes:
        launched: Names of those that have been.
    """

    def __init__(
        self,
        files: Iterable[Path],
        target: str,
        edit: Callable[[Kernel], Kernel] = lambda kernel: kernel,
    ) -> None:
        self._edit = edit
        self._assemblies = [Assembly.of(path) for path in sorted(files) if target in path.name]
        mangled = [name for assembly in self._assemblies for name in assembly.names]
        listed = subprocess.run(
            ["c++filt"], input="\n".join(mangled), check=True, capture_output=True, text=True
        ).stdout
        self._mangled = dict(zip(listed.splitlines(), mangled, strict=True))
        self.target, self.launched = target, set[str]()
        self.of = functools.cache(self._of)

    def _of(self, name: str) -> Launchable:
        mangled = self._mangled[name]
        (assembly,) = [x for x in self._assemblies if mangled in x.names]
        return Launchable.of(self._edit(assembly.kernel(mangled)))

    def run(
        self,
        redirected: Redirect,
        order: Order,
        op: Callable[..., None],
        arguments: Sequence[Any],
        written: Sequence[Tensor],
    ) -> None:
        """Call an op of the emulated GPU. What it launches may touch elements of the arguments."""
        memory = Memory()
        for x in tensors_of(arguments):
            memory.allow(x)
        for x in written:
            memory.allow(x, writable=True)

        def launch(told: Launch) -> None:
            self.launched.add(told.name)
            program, given = self.of(told.name), list(told.arguments)
            program.run(given, told.grid, told.threads, told.shared_bytes, memory, order)

        with redirected(launch):
            op(*arguments)


def tensors_of(arguments: Sequence[Any]) -> list[Tensor]:
    found = []
    for x in arguments:
        found += [x] if isinstance(x, Tensor) else tensors_of(x) if isinstance(x, list) else []
    return found


class GcnOps:
    """The attention ops, with their own arguments as ``GpuEmulatedOps`` has them."""

    def __init__(self, host: GpuEmulatedOps, programs: Programs, order: Order) -> None:
        assert host.wave_size == 64
        self._host, self._programs, self._order = host, programs, order

    def attention_forward(self, *arguments: Any) -> None:
        state = arguments[16:]  # out, lse, and a result where one is wanted
        self._run(self._host.attention_forward, arguments, state)

    def attention_backward(self, *arguments: Any) -> None:
        self._run(self._host.attention_backward, arguments, arguments[-4:])

    def _run(self, op: Any, arguments: Sequence[Any], written: Sequence[Any]) -> None:
        there = [x for x in written if x is not None]
        self._programs.run(self._host.redirected, self._order, op, arguments, there)


class GcnMoves:
    """``attention_delta``, ``state_merge``, ``pack`` and ``unpack``.

    Args:
        ops: The emulated GPU's.
        library: Their file.
    """

    def __init__(self, ops: Any, library: Path, programs: Programs, order: Order) -> None:
        self._ops, self._programs, self._order = ops, programs, order
        self._launches = Launches(ctypes.CDLL(str(library)), library)

    def attention_delta(self, dout: Tensor, out: Tensor, delta: Tensor) -> None:
        self._run(self._ops.attention_delta, (dout, out, delta), [delta])

    def state_merge(self, out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
        self._run(self._ops.state_merge, (out, lse, more_out, more_lse), [out, lse])

    def pack(self, tensors: Sequence[Tensor], message: Tensor) -> None:
        self._run(self._ops.pack, (list(tensors), message), [message])

    def unpack(self, message: Tensor, tensors: Sequence[Tensor]) -> None:
        self._run(self._ops.unpack, (message, list(tensors)), list(tensors))

    def _run(self, op: Any, arguments: Sequence[Any], written: Sequence[Tensor]) -> None:
        self._programs.run(self._launches.redirected, self._order, op, arguments, written)
