"""The attention ops of a build for AMD, run by the interpreter as the kernels' host code asks."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu_host import GpuHostOps
from gpu_launches import Launch
from torch import Tensor

from .assembly import Assembly
from .machine import Order, Program
from .memory import Memory

# how many of each op's arguments, from the last, are written
_WRITTEN = {"attention_forward": 3, "attention_backward": 4}


class Programs:
    """The kernels of one target, decoded when they are first launched."""

    def __init__(self, files: Iterable[Path], target: str) -> None:
        self._assemblies = [Assembly.of(path) for path in sorted(files) if target in path.name]
        mangled = [name for assembly in self._assemblies for name in assembly.names]
        listed = subprocess.run(
            ["c++filt"], input="\n".join(mangled), check=True, capture_output=True, text=True
        ).stdout
        self._mangled = dict(zip(listed.splitlines(), mangled, strict=True))
        self.launched: set[str] = set()
        self.of = functools.cache(self._of)

    def _of(self, name: str) -> Program:
        mangled = self._mangled[name]
        (assembly,) = [x for x in self._assemblies if mangled in x.names]
        return Program.of(assembly.kernel(mangled))


class GcnOps:
    """Has the ops' own arguments, as in docs/design.md; tensors are bf16 or fp16, on the CPU.

    A kernel may read every tensor it is given and write those that the op writes, their elements
    and nothing around or between them.
    """

    def __init__(self, host: GpuHostOps, programs: Programs, order: Order) -> None:
        self._host, self._programs, self._order = host, programs, order

    def attention_forward(self, *arguments: Any) -> None:
        self._call("attention_forward", arguments)

    def attention_backward(self, *arguments: Any) -> None:
        self._call("attention_backward", arguments)

    def _call(self, op: str, arguments: tuple[Any, ...]) -> None:
        memory = Memory()
        written = _WRITTEN[op]
        if op == "attention_forward" and not isinstance(arguments[-3], (Tensor, type(None))):
            written = 2  # no result
        for i, x in enumerate(arguments):
            if isinstance(x, Tensor):
                memory.allow(x, writable=i >= len(arguments) - written)

        def run(launch: Launch) -> None:
            self._programs.launched.add(launch.name)
            self._programs.of(launch.name).run(
                list(launch.arguments),
                launch.grid,
                launch.threads,
                launch.shared_bytes,
                memory,
                self._order,
            )

        with self._host.redirected(run):
            getattr(self._host, op)(*arguments)
