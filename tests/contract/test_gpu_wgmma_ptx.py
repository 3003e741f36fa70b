"""What nvcc makes of csrc/gpu/hopper for sm_90a, executed: wgmma, TMA copies and their barriers.

As in test_gpu_ptx.py; what the host target's stand-ins for these instructions say plays no part.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import ptx
import pytest
import torch
from gpu_builds import BUILD_TIMEOUT_S, Builds
from gpu_host import GpuHostOps, host_ops
from native_case import (
    Case,
    assert_right,
    computed,
    make_inputs,
    new_state,
    options,
)
from ptx.hopper import HopperMachine
from ptx.parse import Variable
from ptx_ops import Kernels, PtxOps

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.timeout(BUILD_TIMEOUT_S + 300),
]

SOURCES = ("wgmma_forward", "wgmma_backward")
BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 8e-3, FP16: 1e-3}
SMALL = Case(batch=1, lq=67, lk=131, heads=(2, 0, 2), head_dim=64, value_head_dim=64, dtype=FP16)
LARGE = {"head_dim": 128, "value_head_dim": 128}
AT_ONCE = partial(HopperMachine, late_copies=False, late_products=False, order="descending")


@pytest.fixture(scope="module")
def kernels(gpu_builds: Builds) -> Kernels:
    built = gpu_builds.of("cuda")
    return Kernels((built.ptx(source, "sm_90a") for source in SOURCES), HopperMachine)


@pytest.fixture
def host() -> Iterator[GpuHostOps]:
    found = host_ops(32)
    found.compute_capability(90)
    yield found
    found.compute_capability(80)


CASES: dict[str, dict[str, Any]] = {
    "fp16_64": {"lq": 131, "lk": 157, "heads": (3, 1, 2), "span": "causal", "prior_keys": 19},
    "bf16_64": {"dtype": BF16, "span": "gaps", "lk": 300, "layout": "sliced", "heads": (1, 0, 1)},
    "fp16_128": {
        "span": "window",
        "layout": "heads_first",
        "batch": 2,
        "heads": (1, 0, 1),
        **LARGE,
    },
    "bf16_128": {"dtype": BF16, "span": "documents", "heads": (3, 1, 2), **LARGE},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name: str, host: GpuHostOps, kernels: Kernels) -> None:
    """To the bit, whenever copies and products are done, and whoever comes first."""
    case = replace(SMALL, **CASES[name])
    x = make_inputs(case)
    late, at_once = (PtxOps(host, kernels.on(m)) for m in (HopperMachine, AT_ONCE))
    results = computed(case, x, late)
    assert_right(case, x, results, TOLERANCE[case.dtype], lse=1e-6)
    for key, result in computed(case, x, at_once).items():
        assert torch.equal(result, results[key]), key
    assert len({x.split("(")[0] for x in late.kernels.launched}) >= 2
    assert all("hopper" in x for x in late.kernels.launched)


def test_the_cases_launch_every_kernel(host: GpuHostOps, kernels: Kernels) -> None:
    launched: set[str] = set()
    for changes in CASES.values():
        case = replace(SMALL, **changes)
        with host.redirected(lambda launch: launched.add(launch.name)):
            computed(case, make_inputs(case), host)
    assert launched == set(kernels.entries)


def forward(
    host: GpuHostOps, kernels: Kernels, case: Case, result: bool = False
) -> tuple[torch.Tensor, ...]:
    x, (out, lse) = make_inputs(case), new_state(case)
    shared = options(case, x, slice(None), masked=True)
    ops = PtxOps(host, kernels)
    if not result:
        ops.attention_forward(x.q, x.k, x.v, *shared, out, lse)
        return out, lse
    finished = torch.full_like(out, torch.nan, dtype=case.dtype)
    lse.fill_(torch.nan)  # is not read
    ops.attention_forward(x.q, x.k, x.v, *shared, None, lse, finished)
    return finished, lse


CAUSAL = replace(SMALL, span="causal", dtype=BF16)


def test_warps_one_by_one(host: GpuHostOps, kernels: Kernels) -> None:
    """As four warps in lockstep, to the bit."""
    whole = forward(host, kernels, CAUSAL)
    parts = forward(host, kernels.on(partial(HopperMachine, together=1, order="random")), CAUSAL)
    assert all(map(torch.equal, whole, parts))


def test_a_result_without_a_state(host: GpuHostOps, kernels: Kernels) -> None:
    out, lse = forward(host, kernels, CAUSAL)
    result, last = forward(host, kernels, CAUSAL, result=True)
    assert torch.equal(result, out.to(BF16)) and torch.equal(last, lse)


def test_shared_memory_may_start_at_any_multiple_of_16(host: GpuHostOps, kernels: Kernels) -> None:
    """What the declaration asks for is what there is; tiles must lie at multiples of 1024."""
    moved = kernels.on(HopperMachine)
    before = Variable("of_somebody_else", 16, 16)
    moved.entries = {
        name: replace(entry, module_shared=(before, *entry.module_shared))
        for name, entry in kernels.entries.items()
    }
    x = make_inputs(CAUSAL)
    assert_right(CAUSAL, x, computed(CAUSAL, x, PtxOps(host, moved)), TOLERANCE[BF16])


def test_what_lies_around_is_not_read(host: GpuHostOps, kernels: Kernels) -> None:
    """Rows past the end are not those of the next head: NaN lies there, or no memory of ours."""
    case = replace(SMALL, batch=2, lq=70, lk=67, layout="heads_first")
    x = make_inputs(case)
    for name in ("q", "k", "v", "dout"):
        tensor = getattr(x, name)
        b, length, heads, dim = tensor.shape
        around = torch.full((b, heads, length + 9, dim), torch.nan, dtype=tensor.dtype)
        around[:, :, :length] = tensor.transpose(1, 2)
        setattr(x, name, around[:, :, :length].transpose(1, 2))
    assert_right(case, x, computed(case, x, PtxOps(host, kernels)), TOLERANCE[FP16])


# What is changed in a kernel's text, and what comes of it.
WAITS = (r"mbarrier\.try_wait\S+ (\w+), .*;", r"mov.pred \1, -1;", "too many|is off")
PRODUCTS = (r"(wgmma\.wait_group\S+\s+)\d", r"\g<1>7", "run on|is off")
BROKEN: dict[str, tuple[str, str, str]] = {
    "copies are not waited for": WAITS,
    "products are not waited for": PRODUCTS,
    "registers may not be ready": (r"wgmma\.fence\S*;", ";", "wgmma.fence"),
    "no room is made": (r"^\s*mbarrier\.arrive\.shared\S+ _.*;", "", "can go on"),
    "another order of numbers": (r"(wgmma[^;]*, 1, 1, 0, )0;", r"\g<1>1;", "is off"),
    "too few bytes": (r"(mbarrier\.arrive\.expect_tx.*, )%r\d+;", r"\g<1>1024;", "can go on"),
}
KERNELS = ("forward_kernel", "wgmma_key_value_kernel", "wgmma_query_kernel")


def check_broken(
    host: GpuHostOps, kernels: Kernels, name: str, change: tuple[str, str, str]
) -> None:
    pattern, new, message = change
    case = replace(SMALL, lk=421, dtype=BF16)
    broken = kernels.edited(f"{name}<usp::gpu::BFloat16, 64>", pattern, new)
    x = make_inputs(case)
    with pytest.raises((AssertionError, ptx.Refused), match=message):
        assert_right(case, x, computed(case, x, PtxOps(host, broken)), TOLERANCE[BF16])


@pytest.mark.parametrize("what", BROKEN)
def test_broken_forward(what: str, host: GpuHostOps, kernels: Kernels) -> None:
    check_broken(host, kernels, "forward_kernel", BROKEN[what])


@pytest.mark.parametrize("change", [WAITS, PRODUCTS], ids=["copies", "products"])
@pytest.mark.parametrize("name", KERNELS[1:])
def test_broken_backward(
    name: str, change: tuple[str, str, str], host: GpuHostOps, kernels: Kernels
) -> None:
    check_broken(host, kernels, name, change)
