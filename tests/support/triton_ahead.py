"""Compiles our kernels for a GPU on a machine without any, as their own launches call them.

``python tests/triton_ahead.py cuda:90/bfloat16:64 cuda:90/float16:128/hopper`` prints a JSON row
for each kernel, each of the Hopper kernels, or with ``/linear`` or
``/channels`` each launch of linear attention's, from as many processes as there are cores. With
``USP_MAIN_LOOPS=1`` a row of attention holds the instructions of the loop over whole tiles.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import traceback
from typing import Any
from unittest import mock

import torch
from sass import TOOLS, disassembled, local_accesses, local_in_main_loop, main_loop
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from usp.kernels import configs
from usp.kernels.arguments import BackwardInputs, KernelOptions, KernelSpan
from usp.kernels.attention_backward import attention_backward
from usp.kernels.attention_forward import attention_forward
from usp.kernels.bias_gradient import bias_gradient
from usp.linear_attention import triton as linear
from usp.linear_attention.kernels import Tokens
from usp.planning.visit import transposed

WARP_SIZES = {"cuda": 32, "hip": 64}
FAMILIES = {
    "cuda:80": "sm_80",
    "cuda:90": "sm_90",
    "cuda:100": "default",
    "hip:gfx90a": "gfx90a",
    "hip:gfx942": "gfx942",
    "hip:gfx950": "gfx942",
}
LENGTH = 1024
# Kernels of linear attention with a decay a token, and with one a channel.
LINEAR = ("linear", "channels")


class NoDevice(DriverBase):
    """A driver that knows its target and can launch nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def target_of(name: str) -> GPUTarget:
    backend, _, arch = name.partition(":")
    return GPUTarget(backend, int(arch) if arch.isdigit() else arch, WARP_SIZES[backend])


def launches(dtype: torch.dtype, head_dim: int, hopper: bool = False) -> None:
    """One causal block with shared key heads through every attention kernel, or the Hopper ones."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    q = new(2, LENGTH, 4, head_dim, dtype=dtype)
    k = new(2, LENGTH, 2, head_dim, dtype=dtype)
    lse, out, dk = new(2, 4, LENGTH), new(*q.shape), new(*k.shape)
    first = torch.zeros(LENGTH, dtype=torch.int32)
    stop = torch.arange(1, LENGTH + 1, dtype=torch.int32)
    seen_by = KernelSpan(*transposed(first, stop, LENGTH))
    scoring = (None, None, None, 0, 4, 2, head_dim**-0.5, 0.0, 0.0, 0)
    options = KernelOptions(first, stop, None, *scoring)
    if not hopper or head_dim < 256:
        attention_forward(q, k, k, options, out, lse)
    if not hopper or head_dim >= 128:  # where registers are scarce
        attention_forward(q, k, k, options, out, lse, result=q)
    if hopper and head_dim == 256:
        return
    given = BackwardInputs(q, q, k, k, lse, lse)
    attention_backward(given, options, seen_by, out, dk, dk)
    if hopper:
        return
    bias = new(2, 4, LENGTH, LENGTH)
    bias_gradient(given, KernelOptions(first, stop, bias, *scoring), seen_by, bias)


def linear_launches(dtype: torch.dtype, head_dim: int, channels: bool) -> None:
    """Every kernel of linear attention, with shared heads of queries and a decay a token, or one a
    channel."""
    q, k = (torch.empty(2, LENGTH, heads, head_dim, dtype=dtype) for heads in (2, 4))
    state = torch.empty(2, 4, head_dim, head_dim)
    tokens = Tokens(q, k, k, torch.empty(2, LENGTH, 4, *([head_dim] if channels else [])))
    out, _, saved = linear.forward(tokens, state, (), True)
    linear.backward(tokens, saved, out, state, (), True)


def compiled(
    target: str, dtype: torch.dtype, head_dim: int, kind: str = ""
) -> list[dict[str, Any]]:
    """What the compiler says of each kernel.

    Args:
        kind: "hopper", "linear", "channels", or none of them.
    """
    hopper = kind == "hopper"
    driver.set_active(NoDevice(target_of(target)))
    rows: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert self.is_gluon() == hopper, f"{self.__name__} is not the kernel that was asked for"
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        loops = kind not in LINEAR and bool(os.environ.get("USP_MAIN_LOOPS"))
        found = resources(kernel, loops) | (pipeline(kernel, log.getvalue()) if hopper else {})
        rows.append({"kernel": self.__name__.removesuffix("_kernel"), **found})
        return kernel

    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(configs, "family", lambda device: FAMILIES[target]),
        mock.patch.object(configs, "device_name", lambda device: target),
        configs.pipelined() if hopper else contextlib.nullcontext(),
    ):
        configs.forget()
        if kind in LINEAR:
            linear_launches(dtype, head_dim, kind == "channels")
        else:
            launches(dtype, head_dim, hopper)
    about = {"target": target, "dtype": str(dtype).removeprefix("torch."), "head_dim": head_dim}
    return [about | {"kind": kind} | row for row in rows]


def pipeline(kernel: Any, log: str) -> dict[str, Any]:
    """Of a Hopper kernel: its asynchronous instructions, and what ptxas says about their order."""
    said = disassembled(kernel.asm["cubin"])
    names = ("HGMMA", "SHFL", "UTMALDG", "USETMAXREG", "LDL", "STL")
    assert "registers" in log, "ptxas has not said what it did"
    return {
        "asynchronous": {name: len(re.findall(rf"\b{name}\b", said)) for name in names},
        "serialized": "serialized" in log,
        "in_loops": local_in_main_loop(said),
    }


def resources(kernel: Any, loops: bool) -> dict[str, Any]:
    """Registers of a thread, bytes of them spilled, shared memory, matrix instructions; with
    ``loops`` the instructions of the main loop.

    ``in_loops`` are the instructions in loops that move what is spilled; of a Hopper kernel in the
    loop over tiles, for a dispatcher's lies around all of it. AMD's loops are not looked for: there
    it is what is spilled at all.
    """
    asm = kernel.asm
    text = asm.get("ptx") or asm["amdgcn"]
    names = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "v_mfma")
    matrix = {name: text.count(name) for name in names if name in text}
    found: dict[str, Any] = nvidia_usage(asm["cubin"]) if "cubin" in asm else amd_usage(text)
    found |= {"shared": kernel.metadata.shared, "matrix": matrix}
    if loops:
        found["main_loop"] = main_loop(disassembled(asm["cubin"]) if "cubin" in asm else text)
    return found


def nvidia_usage(cubin: bytes) -> dict[str, int]:
    """A thread's stack holds nothing but spilled registers: our kernels have no local arrays."""
    tool = TOOLS / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    stack = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", said))
    in_loops = local_accesses(disassembled(cubin)) if stack else 0
    registers = int(re.findall(r"REG:(\d+)", said)[0])
    return {"registers": registers, "spilled": stack, "in_loops": in_loops}


def amd_usage(text: str) -> dict[str, int]:
    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])

    spilled = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    return {"registers": number("vgpr_count"), "spilled": spilled, "in_loops": spilled}


def rows_of(task: str) -> list[dict[str, Any]]:
    """Of one target, dtype and head dim; one row with the error where they do not compile."""
    target, problem, *more = task.split("/")
    dtype, _, head_dim = problem.partition(":")
    kind = "".join(more)
    knobs.nvidia.dump_ptxas_log = kind == "hopper"
    try:
        return compiled(target, getattr(torch, dtype), int(head_dim), kind)
    except Exception:
        error = f"{problem}: {traceback.format_exc()}"
        return [{"target": target, "kind": kind, "error": error}]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="usp-triton-") as cache:
        # fresh, so that every kernel is compiled
        os.environ["TRITON_CACHE_DIR"] = cache
        # forked, so that torch and Triton are imported once; a process knows one target alone
        fork = multiprocessing.get_context("fork")
        with fork.Pool(os.cpu_count(), maxtasksperchild=1) as processes:
            for rows in processes.imap_unordered(rows_of, sys.argv[1:]):
                for row in rows:
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
