"""What nvcc makes of the GPU kernels for sm_80, executed: inline assembly, operand order and all.

The kernels' own host code launches (the emulated GPU's), ``ptx`` runs the PTX that a real build of
the wheel left behind, dense attention in fp64 judges.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import ptx
import pytest
import torch
from gpu_builds import BUILD_TIMEOUT_S, Builds
from gpu_emulated import GpuEmulatedOps, emulated_ops
from gpu_launches import Launch
from native_case import (
    Case,
    assert_right,
    computed,
    expected,
    largest,
    make_inputs,
    new_state,
    options,
)
from ptx_ops import Kernels, PtxOps

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.timeout(BUILD_TIMEOUT_S + 300),
]

SOURCES = ("attention_forward", "attention_backward", "bias_backward")
BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 8e-3, FP16: 1e-3}
LSE_TOLERANCE = 1e-6
SMALL = Case(batch=1, lq=37, lk=83, heads=(2, 0, 2), head_dim=64, value_head_dim=64, dtype=FP16)


def kernels_for(architecture: str, gpu_builds: Builds) -> Kernels:
    built = gpu_builds.of("cuda")
    return Kernels(built.ptx(source, architecture) for source in SOURCES)


@pytest.fixture(scope="module")
def kernels(gpu_builds: Builds) -> Kernels:
    return kernels_for("sm_80", gpu_builds)


@pytest.fixture(scope="module")
def host() -> GpuEmulatedOps:
    return emulated_ops(32)


def machine(order: ptx.Order, together: int = 1, races: bool = False) -> Any:
    return lambda memory: ptx.Machine(memory, order, together, races=races)


def dims(head_dim: int, value_head_dim: int | None = None) -> dict[str, int]:
    return {"head_dim": head_dim, "value_head_dim": value_head_dim or head_dim}


# Kernels without options, of every head dim that there are tiles for, and both dtypes.
PLAIN: dict[str, dict[str, Any]] = {
    "fp16_64": {"lq": 131, "lk": 67, "heads": (3, 1, 2), "span": "causal"},
    "bf16_64": {"dtype": BF16, "span": "gaps", "lk": 131, "layout": "sliced"},
    "fp16_128": {"span": "window", "lq": 67, "prior_keys": 19, "heads": (1, 0, 1), **dims(128)},
    "bf16_128": {"dtype": BF16, "layout": "heads_first", "lq": 19, **dims(128)},
    "fp16_40": {"span": "documents", "heads": (3, 1, 2), **dims(40, 24)},
    "bf16_40": {"dtype": BF16, "span": "random", "layout": "expanded", "batch": 2, **dims(40, 64)},
    "fp16_32": {"span": "strictly_causal", **dims(32)},
    "bf16_32": {"dtype": BF16, "lq": 1, "lk": 1, **dims(8)},
    "fp16_96": {"heads": (1, 0, 1), **dims(96, 72)},
    "bf16_96": {"dtype": BF16, "heads": (1, 6, 7), "span": "causal", **dims(96)},
    "fp16_192": {"lq": 17, "lk": 41, "heads": (1, 0, 1), **dims(192)},
    "bf16_192": {"dtype": BF16, "lq": 17, "lk": 41, "heads": (1, 0, 1), **dims(136, 192)},
    "fp16_256": {"lq": 17, "lk": 41, "heads": (1, 0, 1), **dims(256)},
    "bf16_256": {"dtype": BF16, "lq": 17, "lk": 41, "heads": (1, 0, 1), **dims(248, 64)},
}
LITTLE: dict[str, Any] = {"lq": 19, "lk": 37, "heads": (1, 0, 1)}
EVERYTHING = {"span": "causal", "alibi": "BH", "softcap": 2.0, "dropout_p": 0.2, "prior_keys": 13}
EVERYTHING |= {"bias": "B1QK", "bias_holes": True, "lq": 29, "lk": 43, "value_head_dim": 40}
# Kernels with options have three sizes.
OPTIONS: dict[str, dict[str, Any]] = {
    "everything": {**EVERYTHING, "heads": (2, 1, 2)},
    "bias_and_softcap_bf16": {
        **LITTLE,
        "dtype": BF16,
        "bias": "1HQK",
        "softcap": 5.0,
        **dims(64, 9),
    },
    "alibi": {**LITTLE, "alibi": "1H", "span": "gaps", "lk": 83, **dims(128)},
    "window_and_bias": {**LITTLE, "span": "window", "bias": "11QK", **dims(128, 64)},
    "dropout_bf16": {
        **LITTLE,
        "dtype": BF16,
        "dropout_p": 0.3,
        "bias": "B1QK",
        "lk": 79,
        **dims(128, 40),
    },
    "odd_head_dims": {**LITTLE, "bias": "111K", **dims(253, 37)},
    "odd_head_dims_bf16": {**LITTLE, "dtype": BF16, "bias": "11QK", **dims(256, 193)},
}
CASES = PLAIN | OPTIONS
ORDERS: tuple[ptx.Order, ...] = ("ascending", "descending", "random")


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name: str, host: GpuEmulatedOps, kernels: Kernels) -> None:
    """Warps one after the other, in another order from case to case, and without races."""
    case = replace(SMALL, **CASES[name])
    order = ORDERS[list(CASES).index(name) % 3]
    x = make_inputs(case)
    ops = PtxOps(host, kernels.on(machine(order, races=True)))
    assert_right(case, x, computed(case, x, ops), TOLERANCE[case.dtype], LSE_TOLERANCE)


def test_the_same_sources_for_sm_90(host: GpuEmulatedOps, gpu_builds: Builds) -> None:
    case = replace(SMALL, **CASES["alibi"])
    x = make_inputs(case)
    kernels = kernels_for("sm_90", gpu_builds)
    ops = PtxOps(host, kernels.on(machine("random", races=True)))
    assert_right(case, x, computed(case, x, ops), TOLERANCE[case.dtype], LSE_TOLERANCE)


def test_the_cases_launch_every_kernel(host: GpuEmulatedOps, kernels: Kernels) -> None:
    launched: set[str] = set()

    def note(launch: Launch) -> None:
        launched.add(launch.name)

    for changes in CASES.values():
        case = replace(SMALL, **changes)
        with host.redirected(note):
            computed(case, make_inputs(case), host)
    assert launched == set(kernels.entries)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("prior", [False, True])
def test_a_result_is_the_new_out_rounded(
    prior: bool, dtype: torch.dtype, host: GpuEmulatedOps, kernels: Kernels
) -> None:
    case = replace(SMALL, dtype=dtype, span="gaps", **dims(128 if prior else 64))
    x = make_inputs(case)
    ops = PtxOps(host, kernels.on(machine("descending")))
    shared = options(case, x, slice(None), masked=True)
    out, lse = new_state(case)
    if prior:
        ops.attention_forward(x.q, x.k, x.v, *shared, out, lse)
    before, last_lse = out.clone() if prior else None, lse.clone()
    if not prior:
        last_lse.fill_(torch.nan)  # what is there without a state is not read
    result = torch.full(out.shape, torch.nan, dtype=dtype)
    ops.attention_forward(x.q, x.k, x.v, *shared, before, last_lse, result)
    ops.attention_forward(x.q, x.k, x.v, *shared, out, lse)
    assert torch.equal(lse, last_lse)
    assert torch.equal(result, out.to(dtype))
    assert largest(result.float()) > 0


OVERWRITTEN: dict[str, dict[str, Any]] = {
    "plain": {"span": "gaps", "heads": (3, 1, 2)},
    "parts_of_dk": {**LITTLE, "dtype": BF16, "span": "window", **dims(192, 136)},
    "options": {**LITTLE, "bias": "11QK", "softcap": 2.0, **dims(61, 37)},
}


@pytest.mark.parametrize("name", OVERWRITTEN)
def test_overwritten_gradients_are_the_sums_rounded(
    name: str, host: GpuEmulatedOps, kernels: Kernels
) -> None:
    case = replace(SMALL, **OVERWRITTEN[name])
    x = make_inputs(case)
    ops = PtxOps(host, kernels.on(machine("random", races=True)))
    generator = torch.Generator().manual_seed(1)
    lse, delta = torch.randn(2, case.batch, case.heads[0], case.lq, generator=generator)
    shared = options(case, x, slice(None), masked=True)
    args = (x.dout, x.q, x.k, x.v, delta, lse + 4, *shared)
    sums = [torch.zeros(t.shape) for t in (x.q, x.k, x.v)]
    ops.attention_backward(*args, *sums, None)
    for dtypes in ((case.dtype,) * 3, (case.dtype, torch.float32, torch.float32)):
        made = [torch.full(t.shape, torch.nan, dtype=d) for t, d in zip(sums, dtypes, strict=True)]
        ops.attention_backward(*args, *made, None, True)
        for result, want in zip(made, sums, strict=True):
            assert torch.equal(result, want.to(result.dtype))
            assert largest(want) > 0


def test_any_order_of_warps_gives_the_same_bits(host: GpuEmulatedOps, kernels: Kernels) -> None:
    case = replace(SMALL, lq=67, lk=67, span="causal", heads=(1, 0, 1))
    x = make_inputs(case)
    results = [
        computed(case, x, PtxOps(host, kernels.on(machine(order, together))))
        for order, together in (("ascending", 0), ("ascending", 1), ("descending", 1))
    ]
    for other in results[1:]:
        assert all(torch.equal(other[name], result) for name, result in results[0].items())


# -- changes of the compiled code that must show

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


def assert_near(case: Case, kernel: str, ops: PtxOps) -> None:
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
