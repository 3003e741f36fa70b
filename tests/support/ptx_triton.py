"""Triton kernels on a CPU as the machine code they compile to: PTX, by ``ptx``.

A launch compiles as on a GPU, and Triton's own launcher flattens the arguments; the driver below it
is ours. ``TritonOps("sm_90").attention_forward(q, k, v, ...)`` runs our own launches so.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ptx
import triton.backends.nvidia.driver as nvidia
from ptx.hopper import HopperMachine
from ptx.tensor_map import TensorMap
from ptx_ops import region
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton_ahead import NoDevice
from triton_interpreter import Kernels

from usp.kernels import configs

# Of a thread block, in bytes: sm_80's is the smaller.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
# fp64 holds what a launch is given, of a type that the kernel's parameter has
_PACKED = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H",
    "u32": "I", "u64": "Q", "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip
# CUtensorMapSwizzle, as bytes of a row
_SWIZZLED_ROWS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Launch:
    """What a driver is asked to run.

    Attributes:
        shared: Bytes of dynamic shared memory.
        parameters: The bytes of each, in the kernel's order.
        arguments: What they were made of.
    """

    ptx: str
    name: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    parameters: list[bytes]
    arguments: list[Any]


class Utilities:
    """What Triton compiles C for: ``nvidia.CudaUtils``."""

    def __init__(self, shared: int) -> None:
        self._shared = shared
        self.run: Callable[[Launch], None]
        self._loaded: list[tuple[str, str]] = []

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._shared}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self._loaded.append((name, kernel.decode()))
        handle = len(self._loaded) - 1
        return handle, handle, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def fill_tma_descriptor_tiled(
        self,
        address: int,
        swizzle: int,
        element_bytes: int,
        element_type: int,
        box: list[int],
        shape: list[int],
        strides: list[int],
        padding: int,
    ) -> TensorMap:
        assert element_bytes == 2 and not padding
        return TensorMap(
            address,
            tuple(shape[::-1]),
            tuple(element_bytes * stride for stride in strides[-2::-1]),
            tuple(box[::-1]),
            _SWIZZLED_ROWS[swizzle],
        )

    def build_signature_metadata(self, signature: list[str]) -> list[str]:
        return signature

    def launch(self, *args: Any) -> None:
        x, y, z, _, function, _, _, (num_warps, num_ctas, shared), *rest = args
        *_, global_scratch, profile_scratch, annotations, signature, given = rest
        assert num_ctas == 1 and global_scratch is None and profile_scratch is None
        found = list(_flattened(given, annotations))
        parameters = [_packed(v, kind) for v, kind in zip(found, signature, strict=True)]
        name, text = self._loaded[function]
        parameters += [bytes(8)] * 2
        self.run(Launch(text, name, (x, y, z), 32 * num_warps, shared, parameters, found))


def _flattened(given: Any, annotations: Any) -> Iterator[Any]:
    for value, annotation in zip(given, annotations, strict=True):
        if annotation.type == "tuple":
            yield from _flattened(value, annotation.nested_tuple)
        elif annotation.type == "kernel":
            yield value


def _packed(value: Any, kind: str) -> bytes:
    if isinstance(value, TensorMap):
        assert kind == "nvTmaDesc", kind
        return value.packed()
    if kind.startswith("*"):
        return struct.pack("<Q", value.data_ptr() if hasattr(value, "data_ptr") else value or 0)
    return struct.pack("<" + _PACKED[kind], value)


class PtxDriver(NoDevice):
    """A device that runs PTX; its number is that of its architecture, as Triton caches by it."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self, family: str) -> None:
        self._arch = int(family.removeprefix("sm_"))
        super().__init__(GPUTarget("cuda", self._arch, 32))
        self.utils = Utilities(SHARED[family])

    def get_current_device(self) -> int:
        return self._arch


# What is loaded stays with the device, as Triton keeps it.
_device = cache(PtxDriver)


def _no_assembler(*args: Any) -> Any:
    """In place of the last stage, ptxas: what is loaded is the PTX itself."""
    if not args:
        return "ptx", "ptx"
    _, stages, *_ = args
    stages["cubin"] = lambda source, metadata: source.encode()
    return None


@contextmanager
def launches(family: str, run: Callable[[Launch], None]) -> Iterator[None]:
    """In here a launch of a Triton kernel compiles it for ``family``, and calls ``run``."""
    kinds = SimpleNamespace(ARG_CONSTEXPR="constexpr", ARG_KERNEL="kernel", ARG_TUPLE="tuple")
    with ExitStack() as stack:
        for name, value in vars(kinds).items():
            stack.enter_context(mock.patch.object(nvidia, name, value))
        stack.enter_context(mock.patch.object(nvidia, "PyKernelArg", SimpleNamespace))
        stack.enter_context(
            mock.patch.object(knobs.runtime, "add_stages_inspection_hook", _no_assembler)
        )
        stack.enter_context(mock.patch.object(configs, "family", lambda device: family))
        stack.enter_context(mock.patch.object(configs, "device_name", lambda device: family))
        configs.forget()
        ours = _device(family)
        ours.utils.run = run
        # not set_active: there may be no other to go back to
        stack.enter_context(mock.patch.object(driver, "_active", ours))
        stack.callback(configs.forget)
        yield


@cache
def _entry(text: str, name: str) -> ptx.Entry:
    return ptx.entries(text)[name]


def _region(argument: Any) -> ptx.Region | None:
    """Of what a launch is given: memory that it may read."""
    if isinstance(argument, TensorMap):
        last = (argument.sizes[0] - 1) * 2
        last += sum((n - 1) * s for n, s in zip(argument.sizes[1:], argument.strides, strict=True))
        return ptx.Region.at("a tensor map", argument.base, last + 2, writable=False)
    tensor = getattr(argument, "base", argument)
    return region("argument", tensor, writable=False) if isinstance(tensor, Tensor) else None


@contextmanager
def executed(family: str) -> Iterator[list[str]]:
    """In here launches run as that GPU's PTX, on memory that may all be written; gives names."""
    launched: list[str] = []

    def run(launch: Launch) -> None:
        tensors = [getattr(x, "base", x) for x in launch.arguments]
        regions = [region("argument", x, writable=True) for x in tensors if isinstance(x, Tensor)]
        HopperMachine(ptx.Memory(regions)).launch(
            _entry(launch.ptx, launch.name),
            launch.parameters,
            launch.grid,
            launch.threads,
            launch.shared,
        )
        launched.append(launch.name)

    with launches(family, run):
        yield launched


class TritonOps:
    """The ops with the contract's arguments, by our Triton kernels.

    Args:
        family: Of GPUs, sm_80 or sm_90.
        machine: What runs PTX.
        pipelined: Whether the Hopper kernels do what they can.
        edit: Changes a kernel before it is run.

    Attributes:
        launched: Names of the kernels that were, in order.
    """

    def __init__(
        self,
        family: str,
        machine: Callable[[ptx.Memory], ptx.Machine] = HopperMachine,
        pipelined: bool = False,
        edit: Callable[[ptx.Entry], ptx.Entry] = lambda entry: entry,
    ) -> None:
        self._family, self._machine, self._edit = family, machine, edit
        self._pipelined = pipelined
        self.launched: list[str] = []

    def attention_forward(self, *arguments: Any) -> None:
        self.call(Kernels.attention_forward, *arguments, written=arguments[-2:])

    def attention_backward(self, *arguments: Any) -> None:
        self.call(Kernels.attention_backward, *arguments, written=arguments[-4:])

    def call(self, op: Callable[..., Any], *arguments: Any, written: Iterable[Any]) -> Any:
        """Call what launches our kernels; they may write to the tensors in ``written`` alone."""
        writable = [region("result", x) for x in written if isinstance(x, Tensor)]

        def run(launch: Launch) -> None:
            self.launched.append(launch.name)
            others = [_region(x) for x in launch.arguments]
            memory = ptx.Memory([*writable, *(x for x in others if x is not None)])
            entry = self._edit(_entry(launch.ptx, launch.name))
            self._machine(memory).launch(
                entry, launch.parameters, launch.grid, launch.threads, launch.shared
            )

        preferred = configs.pipelined() if self._pipelined else nullcontext()
        with launches(self._family, run), preferred:
            return op(*arguments)
