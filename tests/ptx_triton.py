"""Triton kernels on a CPU as the machine code they compile to: PTX, by ``ptx``.

``with executed("sm_90"): attention_forward(q, k, v, ...)`` compiles at a launch as on a GPU, and
has Triton's own launcher flatten the arguments; the driver below it is ours.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton.backends.nvidia.driver as nvidia
from ptx.tensor_map import TensorMap
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton_ahead import NoDevice

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
    """What a driver is asked to run; ``parameters`` in the order of the kernel's."""

    ptx: str
    name: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    parameters: list[bytes]


class Utilities:
    """What Triton compiles C for: ``nvidia.CudaUtils``."""

    def __init__(self, shared: int, run: Callable[[Launch], None]) -> None:
        self._shared, self._run = shared, run
        self.loaded: dict[int, tuple[str, str]] = {}
        self.signatures: dict[bytes, list[str]] = {}

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._shared}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        handle = len(self.loaded) + 1
        self.loaded[handle] = name, kernel.decode()
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
        name, ptx = self.loaded[function]
        self._run(
            Launch(ptx, name, (x, y, z), 32 * num_warps, shared, [*parameters, *[bytes(8)] * 2])
        )


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

    def __init__(self, arch: int, utilities: Utilities) -> None:
        super().__init__(GPUTarget("cuda", arch, 32))
        self._arch, self.utils = arch, utilities

    def get_current_device(self) -> int:
        return self._arch


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
    utilities = Utilities(SHARED[family], run)
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
        ours = PtxDriver(int(family.removeprefix("sm_")), utilities)
        # not set_active: there may be no other to go back to
        stack.enter_context(mock.patch.object(driver, "_active", ours))
        stack.callback(configs.forget)
        yield
