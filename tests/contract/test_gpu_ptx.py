"""The PTX of nvcc beside the contract: every kernel is launched, and changes of it must show."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace

import ptx
import pytest
import torch
from gpu_builds import BUILD_TIMEOUT_S, Builds
from gpu_emulated import GpuEmulatedOps, emulated_ops
from gpu_launches import Launch
from kernel_call import (
    Call,
    computed,
    expected,
    largest,
    make_inputs,
    new_state,
    options,
)
from promises import answers
from ptx_ops import Kernels, PtxOps
from subjects.ptx import FP16, SUBJECTS, TOLERANCE, kernels_for, machine

pytestmark = [
    pytest.mark.device_code,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.timeout(BUILD_TIMEOUT_S + 300),
]

(SM_80,) = SUBJECTS
SMALL = SM_80.base


@pytest.fixture(scope="module")
def kernels(gpu_builds: Builds) -> Kernels:
    return kernels_for("sm_80", gpu_builds)


@pytest.fixture(scope="module")
def host() -> GpuEmulatedOps:
    return emulated_ops(32)


def test_the_same_sources_for_sm_90(request: pytest.FixtureRequest, gpu_builds: Builds) -> None:
    sm_90 = replace(SM_80, name="ptx-sm_90", order="random")
    case = sm_90.case("alibi", SM_80.mixtures["alibi"])
    sm_90.assert_right(case, sm_90.run(request, answers, case))


def test_the_cases_launch_every_kernel(host: GpuEmulatedOps, kernels: Kernels) -> None:
    launched: set[str] = set()

    def note(launch: Launch) -> None:
        launched.add(launch.name)

    for changes in SM_80.mixtures.values():
        case = replace(SMALL, **changes)
        with host.redirected(note):
            computed(case, make_inputs(case), host)
    assert launched == set(kernels.entries)


# Pattern, replacement, and the kernels in which both are tried.
ALL = ("forward_kernel", "key_value_kernel", "query_kernel")


CHANGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "nothing": (r"\A", "", ALL),
    "the halves of a pair": (
        *(r"(cvt\.rn\.f16x2\.f32 %r\d+), (%f\d+), (%f\d+);", r"\1, \3, \2;"),
        ("forward_kernel", "key_value_kernel"),
    ),
    "a matrix not transposed": (r"(ldmatrix\S*\.x4)\.trans", r"\1", ALL),
    "registers of matrices": (
        *(r"(ldmatrix[^{]*)\{(%r\d+), (%r\d+), ", r"\1{\3, \2, "),
        ("forward_kernel",),
    ),
    "operands of products": (
        *(r"(mma\.\S+ \{[^}]*\}), \{(%r\d+), (%r\d+), ", r"\1, {\3, \2, "),
        ("query_kernel",),
    ),
    "copies not waited for": (r"cp\.async\.wait_all;", "", ALL),
    "no barriers": (r"bar\.sync\s+0;", "", ALL),
    "a copy from elsewhere": (
        *(r"(cp\.async\.cg\S+ \[%r\d+\]), \[(%rd\d+)\]", r"\1, [\2+16]"),
        ("key_value_kernel",),
    ),
}


RESULTS = {"forward_kernel": ("out",), "key_value_kernel": ("dk", "dv"), "query_kernel": ("dq",)}


@pytest.mark.parametrize(
    ("kernel", "change"),
    [(kernel, change) for change, (_, _, tried) in CHANGES.items() for kernel in tried],
)
def test_a_change_shows(kernel: str, change: str, host: GpuEmulatedOps, kernels: Kernels) -> None:
    """As wrong numbers, poison among them, or as an access that is refused; nothing does not."""
    case = replace(SMALL, lk=71, heads=(1, 0, 1), span="causal")
    pattern, new, _ = CHANGES[change]
    changed = kernels.edited(f"{kernel}<usp::gpu::Float16, 64, true>", pattern, new)
    ops = PtxOps(host, changed.on(machine("descending")))
    raises = pytest.raises((AssertionError, ptx.Refused), match=f"{kernel}|is off by")
    with nullcontext() if change == "nothing" else raises:
        assert_near(case, kernel, ops)


def assert_near(case: Call, kernel: str, ops: PtxOps) -> None:
    """What one kernel gives, with everything else from the oracle."""
    x = make_inputs(case)
    want = expected(case, x)
    shared = options(case, x, slice(None), masked=True)
    if kernel == "forward_kernel":
        got = dict(zip(("out", "lse"), new_state(case), strict=True))
        ops.attention_forward(x.q, x.k, x.v, *shared, *got.values())
    else:
        delta = (x.dout.double() * want["out"]).sum(-1).transpose(1, 2) - x.dlse
        got = {f"d{name}": torch.zeros(getattr(x, name).shape) for name in "qkv"}
        rest = (delta.float().contiguous(), want["lse"].float(), *shared, *got.values(), None)
        ops.attention_backward(x.dout, x.q, x.k, x.v, *rest)
    for name in RESULTS[kernel]:
        worst = largest(got[name].double() - want[name])
        assert worst <= 4 * TOLERANCE[FP16], f"{name} is off by {worst}"
