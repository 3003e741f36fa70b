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


def kernels_unavailable() -> str | None:
    """On a worker: why none can run."""
    from usp import kernels

    return kernels.unavailable()


class Kernels:
    """Our Triton kernels under the names and signatures of the compiled ops."""

    @staticmethod
    def attention_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
        from usp.kernels.arguments import KernelOptions
        from usp.kernels.attention_forward import attention_forward

        *shared, out, lse = rest
        attention_forward(q, k, v, KernelOptions(*shared), out, lse)

    @staticmethod
    def attention_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse: Tensor, *rest: Any
    ) -> None:
        from usp.kernels.arguments import BackwardInputs, KernelOptions, KernelSpan
        from usp.kernels.attention_backward import attention_backward
        from usp.kernels.bias_gradient import bias_gradient
        from usp.planning.plan import transposed

        *shared, dq, dk, dv, dbias = rest
        options, seen_by = KernelOptions(*shared), None
        if options.span is not None:
            seen_by = KernelSpan(*transposed(*options.span, k.shape[1]))
        given = BackwardInputs(dout, q, k, v, delta, lse)
        attention_backward(given, options, seen_by, dq, dk, dv)
        if dbias is not None:
            bias_gradient(given, options, seen_by, dbias)


def computed(case: Any) -> dict[str, Tensor]:
    """On a worker: the kernels' results."""
    import native_case

    return native_case.computed(case, native_case.make_inputs(case), Kernels)


def finished(case: Any, carried: bool) -> Tensor:
    """On a worker: the result of the last block of keys, before which there is a state, or none."""
    import native_case

    from usp.kernels.arguments import KernelOptions
    from usp.kernels.attention_forward import attention_forward

    x = native_case.make_inputs(case)
    out, lse = native_case.new_state(case)
    *before, (keys, masked) = native_case.blocks(case)
    for prior, _ in before:
        options = KernelOptions(*native_case.options(case, x, prior, masked=False))
        attention_forward(x.q, x.k[:, prior], x.v[:, prior], options, out, lse)
    kept, result = out.clone(), torch.full_like(out, torch.nan, dtype=case.dtype)
    options = KernelOptions(*native_case.options(case, x, keys, masked=masked))
    held = out if carried else None
    attention_forward(x.q, x.k[:, keys], x.v[:, keys], options, held, lse, result)
    assert torch.equal(out, kept)
    return result


def guarded(shape: Any, fill: float) -> tuple[Tensor, Tensor]:
    """A tensor inside a larger one, whose rest must stay as it is."""
    margin, count = 512, torch.Size(shape).numel()
    around = torch.full((count + 2 * margin,), 12345.0)
    inside = around[margin : margin + count].view(shape)
    inside.fill_(fill)
    return inside, around


def written_outside(case: Any) -> dict[str, int]:
    """On a worker: how many numbers beside each result were changed."""
    import native_case

    from usp.kernels.attention_delta import launch_delta

    x = native_case.make_inputs(case)
    shapes = native_case.new_state(case)
    made = {"out": guarded(shapes[0].shape, 0.0), "lse": guarded(shapes[1].shape, -torch.inf)}
    shared = native_case.options(case, x, slice(None), masked=True)
    Kernels.attention_forward(x.q, x.k, x.v, *shared, made["out"][0], made["lse"][0])
    made["delta"] = guarded(shapes[1].shape, 0.0)
    launch_delta(x.dout, made["out"][0], made["delta"][0])
    for name in ("q", "k", "v", "bias"):
        made[f"d{name}"] = guarded(getattr(x, name).shape, 0.0)
    sums = [made[name][0] for name in ("dq", "dk", "dv", "dbias")]
    state = (made["delta"][0], made["lse"][0])
    Kernels.attention_backward(x.dout, x.q, x.k, x.v, *state, *shared, *sums)
    return {
        name: around.numel() - inside.numel() - int((around == 12345.0).sum())
        for name, (inside, around) in made.items()
    }


def far_apart(case: Any, gap: int) -> dict[str, Tensor]:
    """On a worker: results for rows of q, k, v, dout that all are k's and lie ``gap`` apart."""
    import native_case

    x = native_case.make_inputs(case)
    far = torch.empty(case.lq * gap, dtype=case.dtype).as_strided(x.k.shape, (1, gap, 1, 1))
    x.q = x.k = x.v = x.dout = far.copy_(x.k)
    return native_case.computed(case, x, Kernels)


def delta_of(dout: Tensor, out: Tensor) -> Tensor:
    """On a worker."""
    from usp.kernels.attention_delta import attention_delta

    return attention_delta(dout, out)


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
