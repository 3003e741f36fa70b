"""Attention through the Hopper kernels, emulated: one call of the contract, or a whole mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import judge
import torch
from cases import Case as MeshCase
from gluon.emulator import Kernel
from gluon.machine import Timing
from kernel_call import (
    Call,
    computed,
    error_scale,
    expected,
    largest,
    make_inputs,
)
from subjects.gluon import TIMINGS, TOLERANCE
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton_interpreter import Kernels

from usp.backends import _self_check, triton
from usp.kernels import configs
from usp.kernels.hopper import launch
from usp.kernels.hopper_configs import Pipeline
from usp.planning.problem import Traits

__all__ = ["TIMINGS"]
# Steps as small as wgmma and a warp take them, so that short sequences have many.
SMALL_STEPS = {
    "forward": Pipeline(128, 16, 3),
    "backward_keys": Pipeline(32, 128, 3),
    "backward_queries": Pipeline(128, 16, 2),
}


@contextmanager
def emulated(timing: Timing) -> Iterator[None]:
    """In here the Hopper kernels run on the CPU, wherever they can."""
    with ExitStack() as stack:
        for name, value in vars(launch).copy().items():
            if isinstance(value, JITFunction):
                stack.enter_context(mock.patch.object(launch, name, Kernel(value, timing)))
        stack.enter_context(mock.patch.object(configs, "family", lambda device: "sm_90"))
        yield


@contextmanager
def small_steps(timing: Timing) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(emulated(timing))
        for kernel, config in SMALL_STEPS.items():
            stack.enter_context(configs.trying(kernel, config))
        yield


def attended(case: Call, timing: Timing) -> dict[str, Tensor]:
    """All results. A call that fell back would not: the portable kernels do not run on CPU."""
    with small_steps(timing):
        return computed(case, make_inputs(case), Kernels)


def errors(case: Call, got: dict[str, Tensor]) -> dict[str, float]:
    """Of each result what it is off by, in units of what is allowed; NaN where it is NaN."""
    x = make_inputs(case)
    want = expected(case, x)
    assert got.keys() == want.keys()
    found = {}
    for name, reference in want.items():
        empty = reference == -torch.inf
        result = got[name].double()
        assert result.shape == reference.shape, name
        assert torch.equal(result == -torch.inf, empty), f"{name}: rows that see nothing differ"
        worst = largest(torch.where(empty, 0, result - reference))
        found[name] = worst / (TOLERANCE[case.dtype] * error_scale(case, x, want, name))
    return found


def assert_right(case: Call, got: dict[str, Tensor]) -> None:
    for name, error in errors(case, got).items():
        # a NaN is no success
        assert error <= 1, f"{name} is off by {error:.2f} of what is allowed in {case}"


def attended_on_a_mesh(case: MeshCase, timing: Timing) -> dict[str, Tensor]:
    """On a worker: this rank's results by the public function, whose Triton backend this is."""

    with small_steps(timing), as_a_backend():
        return judge.run(case)


@contextmanager
def as_a_backend() -> Iterator[None]:
    """In here the Triton backend takes problems on the CPU."""

    def delta(dout: Tensor, out: Tensor) -> Tensor:
        return (dout.float() * out.float()).sum(-1).transpose(1, 2).contiguous()

    with (
        mock.patch("usp.backends.triton.reasons_against", lambda traits: ()),
        # a portable kernel, which does not run here
        mock.patch("usp.kernels.attention_delta.attention_delta", delta),
    ):
        yield


def self_check(timing: Timing, head_dim: int) -> str | None:
    """What usp's own check finds wrong with the Hopper kernels, as the backend's variant."""
    traits = Traits("cpu", torch.bfloat16, head_dim, head_dim, head_dim**-0.5)
    with emulated(timing), as_a_backend(), triton.only_variant():
        return _self_check.wrong_with(triton, traits, torch.device("cpu"))
