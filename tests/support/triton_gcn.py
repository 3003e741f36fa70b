"""Our Triton kernels compiled for AMD and executed by ``gcn``, launched by their own host code.

``python tests/triton_gcn.py hip:gfx942`` prints the names of the kernels that were right, and with
``linear`` behind it those of linear attention.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import kernel_call
import torch
from gcn.assembly import Assembly
from gcn.machine import Launchable, Order
from gcn.memory import Memory
from kernel_call import Call
from linear_walks import Walk, assert_walk
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_ahead import FAMILIES, WARP_SIZES, NoDevice, target_of
from triton_interpreter import Kernels

from usp.kernels import configs
from usp.linear_attention import triton
from usp.linear_attention.trust import results

TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
LSE_TOLERANCE = {torch.bfloat16: 1e-6, torch.float16: 5e-5}  # see test_gpu_gcn.py
_SMALL = Call(
    batch=1,
    lq=37,
    lk=67,
    heads=(2, 0, 2),
    head_dim=64,
    value_head_dim=64,
    dtype=torch.bfloat16,
    span="causal",
)
_OPTIONS: dict[str, Any] = {"bias": "11QK", "alibi": "1H", "softcap": 2.0, "dropout_p": 0.2}
CASES = {
    "hip:gfx90a": (replace(_SMALL, dtype=torch.float16),),
    "hip:gfx942": (_SMALL, replace(_SMALL, heads=(1, 0, 1), value_head_dim=37, **_OPTIONS)),
}
_FORMATS = {"i32": "<i", "i64": "<q", "fp32": "<f", "u32": "<I", "u64": "<Q", "fp64": "<d"}


def flat(types: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """The numbers and tensors that a compiled kernel takes, with Triton's names of their types."""
    if isinstance(types, tuple | list):
        for pair in zip(types, values, strict=True):
            yield from flat(*pair)
    elif types != "constexpr":
        yield types, values


def argument(kind: str, value: Any) -> bytes:
    if isinstance(value, Tensor):
        return struct.pack("<Q", value.data_ptr())
    return struct.pack(_FORMATS[kind], value)


class Runner:
    """Stands in for the launch of a kernel."""

    def __init__(self, order: Order) -> None:
        self.order, self.launched = order, list[str]()

    def run(self, kernel: Any, given: dict[str, Any], grid: tuple[int, ...]) -> None:
        taken = [x for name, kind in kernel.src.signature.items() for x in flat(kind, given[name])]
        assembly = Assembly(kernel.asm["amdgcn"])
        program = Launchable.of(assembly.kernel(kernel.metadata.name))
        memory = Memory()
        for _, value in taken:
            if isinstance(value, Tensor):
                memory.allow(value, writable=True)
        arguments = [argument(kind, value) for kind, value in taken]
        # Triton's own two: scratch memory that no kernel of ours asks for
        wanted = [x for x in program.kernel.arguments if not x.kind.startswith("hidden_")]
        arguments += [bytes(8)] * (len(wanted) - len(arguments))
        threads = kernel.metadata.num_warps * WARP_SIZES["hip"]
        blocks = (*grid, 1, 1)[:3]
        program.run(arguments, blocks, threads, kernel.metadata.shared, memory, self.order)
        self.launched.append(kernel.metadata.name)


@contextmanager
def executed(target: str, order: Order) -> Iterator[list[str]]:
    """Meanwhile Triton's kernels run as that GPU's machine code; gives their names."""
    driver.set_active(NoDevice(target_of(target)))
    runner, compile_ = Runner(order), JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = compile_(self, *args, grid=grid, warmup=True, **options)
        given = dict(zip(self.arg_names, args, strict=False)) | options
        runner.run(kernel, given, grid(given) if callable(grid) else grid)
        return kernel

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(configs, "family", lambda device: FAMILIES[target]),
        mock.patch.object(configs, "device_name", lambda device: target),
    ):
        configs.forget()
        yield runner.launched
    configs.forget()


def check(target: str, case: Call, order: Order) -> list[str]:
    """Every result against dense attention; returns which kernels have run."""
    x = kernel_call.make_inputs(case)
    with executed(target, order) as launched:
        got = kernel_call.computed(case, x, Kernels)
    tolerance = TOLERANCE[case.dtype]
    kernel_call.assert_right(case, x, got, tolerance, LSE_TOLERANCE[case.dtype])
    return launched


def check_linear(target: str, order: Order) -> list[str]:
    """Every result of linear attention's kernels against its recurrence."""
    small = Walk(batch=1, length=35, heads=(1, 1, 1), dims=(16, 16), dtype=torch.bfloat16)
    with executed(target, order) as launched:
        for walk in (replace(small, length=70, heads=(1, 1, 2)), replace(small, g="blhd")):
            found = results(triton, *walk.inputs())
            assert_walk(walk, found, {torch.bfloat16: 1e-2}, rounds=True)
    return launched


if __name__ == "__main__":
    if sys.argv[2:] == ["linear"]:
        print(*check_linear(sys.argv[1], Order()))
        sys.exit()
    orders = (Order(), Order(late=False, descending=True))
    for case_, order_ in zip(CASES[sys.argv[1]], orders, strict=False):
        print(*check(sys.argv[1], case_, order_))
