"""Triton's interpreter in a worker, and the contract's two functions through our kernels."""

from __future__ import annotations

import os
import sys
from typing import Any

from torch import Tensor


def start_interpreter() -> None:
    """In a fresh process, before anything asks for a kernel."""
    os.environ["TRITON_INTERPRET"] = "1"
    # torch has imported Triton already, whose own functions took the compiler then
    for name in list(sys.modules):
        if name.split(".")[0] == "triton" and not name.startswith("triton._C"):
            del sys.modules[name]
    _mend_bf16()


def _mend_bf16() -> None:
    """The interpreter keeps bf16 as uint16: it multiplies the bits, and truncates what it casts."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    create_dot, truncate = builder.create_dot, builder.create_fp_trunc

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    def rounded(self: Any, source: Any, dst_type: Any) -> Any:
        if dst_type.scalar != tl.bfloat16 or source.dtype.scalar != tl.float32:
            return truncate(self, source, dst_type)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return interpreter.TensorHandle(nearest_even.astype(np.uint16), dst_type.scalar)

    builder.create_dot, builder.create_fp_trunc = dot, rounded


def kernels_unavailable() -> str | None:
    """On a worker: why none can run."""
    from usp import kernels

    return kernels.unavailable()


# from `first` to `dropout_seed`
NUM_OPTIONS = 13


class Kernels:
    """Our Triton kernels under the names and signatures of the compiled ops."""

    @staticmethod
    def attention_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
        from usp.kernels.arguments import KernelOptions
        from usp.kernels.attention_forward import attention_forward

        shared, state = rest[:NUM_OPTIONS], rest[NUM_OPTIONS:]
        attention_forward(q, k, v, KernelOptions(*shared), *state)

    @staticmethod
    def attention_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse: Tensor, *rest: Any
    ) -> None:
        from usp.kernels.arguments import BackwardInputs, KernelOptions, KernelSpan
        from usp.kernels.attention_backward import attention_backward
        from usp.kernels.bias_gradient import bias_gradient
        from usp.planning.visit import transposed

        *shared, dq, dk, dv, dbias = rest
        options, seen_by = KernelOptions(*shared), None
        if options.span is not None:
            seen_by = KernelSpan(*transposed(*options.span, k.shape[1]))
        given = BackwardInputs(dout, q, k, v, delta, lse)
        attention_backward(given, options, seen_by, dq, dk, dv)
        if dbias is not None:
            bias_gradient(given, options, seen_by, dbias)


def interpreted(promise: Any, *args: Any) -> Any:
    """On a worker: what is done with the kernels, see ``contract/promises.py``."""
    return promise(Kernels, *args)


def searched(given: Any) -> dict[str, tuple[Any, int]]:
    """On a worker: what tuning finds for each kernel, and how many candidates it has timed."""
    from unittest import mock

    from usp.kernels import configs, tune

    timed: dict[str, int] = {}

    def time_of(trial: Any) -> float:
        trial()
        (kernel,) = configs._asked
        timed[kernel] = timed.get(kernel, 0) + 1
        return 1.0 / timed[kernel]

    with (
        mock.patch.object(configs, "family", lambda device: "sm_90"),
        mock.patch.object(
            tune, "candidates_that_finish", lambda kernel, candidates, *_: list(candidates)
        ),
    ):
        found = tune.search(*given, time_of)
    return {kernel: (config, timed[kernel]) for kernel, config in found.items()}
