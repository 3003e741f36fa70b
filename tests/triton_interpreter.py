"""Triton's interpreter in a worker, and the contract's two functions through our kernels."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
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


class Kernels:
    """Our Triton kernels under the names and signatures of the compiled ops."""

    @staticmethod
    def attention_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
        from usp.kernels.arguments import Options
        from usp.kernels.attention_forward import attention_forward

        *shared, out, lse = rest
        attention_forward(q, k, v, Options(*shared), out, lse)

    @staticmethod
    def attention_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse: Tensor, *rest: Any
    ) -> None:
        from usp.kernels.arguments import Options, Span
        from usp.kernels.attention_backward import Given, attention_backward
        from usp.kernels.bias_gradient import bias_gradient
        from usp.plan import transposed

        *shared, dq, dk, dv, dbias = rest
        options, seen_by = Options(*shared), None
        if options.span is not None:
            seen_by = Span(*transposed(*options.span, k.shape[1]))
        given = Given(dout, q, k, v, delta, lse)
        attention_backward(given, options, seen_by, dq, dk, dv)
        if dbias is not None:
            bias_gradient(given, options, seen_by, dbias)


def computed(case: Any) -> dict[str, Tensor]:
    """On a worker: the kernels' results."""
    import native_case

    return native_case.computed(case, native_case.make_inputs(case), Kernels)


def finished(case: Any, carried: bool) -> tuple[Tensor, Tensor]:
    """On a worker: out and the result after one step that is the last; with a state, or none."""
    import native_case

    from usp.kernels.arguments import Options
    from usp.kernels.attention_forward import attention_forward

    x = native_case.make_inputs(case)
    out, lse = native_case.new_state(case)
    result = torch.full_like(out, torch.nan, dtype=case.dtype)
    options = Options(*native_case.options(case, x, slice(None), masked=True))
    attention_forward(x.q, x.k, x.v, options, out if carried else None, lse, result)
    return out, result
