"""The PTX that Triton makes of our kernels, executed: what a GPU is given, without one.

Our own launch code launches, Triton's own launcher passes the arguments, ``ptx`` executes.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from kernel_call import (
    Call,
    Inputs,
    assert_right,
    computed,
    expected,
    largest,
    make_inputs,
    new_state,
    options,
    whole_and_in_blocks,
)

from usp import kernels

pytest.importorskip("triton")

import ptx
from linear_walks import Walk, assert_walk
from ptx.hopper import HopperMachine
from ptx_triton import TritonOps, executed
from torch import Tensor
from triton import knobs

from usp.kernels import configs
from usp.linear_attention import triton
from usp.linear_attention.trust import results

pytestmark = pytest.mark.device_code
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
BASE = Call(
    batch=1, lq=67, lk=131, heads=(3, 1, 2), head_dim=64, value_head_dim=64, dtype=torch.bfloat16
)
needs_gluon = pytest.mark.skipif(not kernels.has_gluon(), reason="no Triton with Gluon for Hopper")
AT_ONCE = partial(HopperMachine, late_copies=False, late_products=False, order="descending")


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A kernel is compiled once here, and not by another version of anything."""
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def check(ops: TritonOps, case: Call) -> None:
    x = make_inputs(case)
    assert_right(case, x, computed(case, x, ops), TOLERANCE[case.dtype], lse=1e-5)


CAUSAL = replace(BASE, span="causal")
GAPS = replace(BASE, span="gaps", batch=2, heads=(1, 0, 1), layout="sliced", dtype=torch.float16)
WIDE = replace(GAPS, head_dim=128, value_head_dim=128)
SCORES = replace(GAPS, lq=37, lk=71, heads=(2, 1, 2), bias="1HQK", bias_holes=True, alibi="BH")
SCORES = replace(SCORES, softcap=3.0, dropout_p=0.2)
ATTENTION = ["forward_kernel", "keys_kernel", "queries_kernel"]


def attended(ops: TritonOps, case: Call) -> tuple[Inputs, Tensor, Tensor]:
    """Inputs, out and lse."""
    x, state = make_inputs(case), new_state(case)
    ops.attention_forward(x.q, x.k, x.v, *options(case, x, slice(None), masked=True), *state)
    return x, *state


def test_hopper() -> None:
    ops = TritonOps("sm_90")
    check(ops, CAUSAL)
    assert ops.launched == ATTENTION


@pytest.mark.parametrize("family", ["sm_80", "sm_90"])
def test_wide_heads(family: str) -> None:
    ops = TritonOps(family)
    check(ops, WIDE)
    assert ops.launched == ATTENTION


def test_hopper_with_a_bias() -> None:
    """Its tiles are staged beside those of keys and values: there is memory for all of them."""
    case = replace(CAUSAL, bias="1HQK")
    x, out, _ = attended(TritonOps("sm_90"), case)
    torch.testing.assert_close(out.double(), expected(case, x)["out"], rtol=0, atol=1e-2)


def test_ampere() -> None:
    ops = TritonOps("sm_80", partial(HopperMachine, order="random"))
    check(ops, CAUSAL)
    assert ops.launched == ATTENTION


def test_every_kind_of_score() -> None:
    """In tiles smaller than a GPU's: what is compiled is long."""
    ops = TritonOps("sm_80")
    with ExitStack() as stack:
        for kernel in configs.TABLE["sm_80"]:
            stack.enter_context(configs.trying(kernel, configs.Config(32, 32, 16, 4, 2)))
        check(ops, SCORES)
    assert ops.launched == [*ATTENTION, "bias_gradient_kernel"]


@needs_gluon
@pytest.mark.parametrize("case", [CAUSAL, WIDE], ids=["causal", "gaps"])
def test_pipelines(case: Call) -> None:
    """Copies and products as late as they may be, or at once, warps the other way round."""
    x, found = make_inputs(case), []
    for machine in (HopperMachine, AT_ONCE):
        ops = TritonOps("sm_90", machine, pipelined=True)
        found.append(computed(case, x, ops))
    assert_right(case, x, found[0], TOLERANCE[case.dtype], lse=1e-5)
    for name, result in found[0].items():
        assert torch.equal(result, found[1][name]), name


@needs_gluon
def test_warps_one_by_one() -> None:
    """As a warpgroup in lockstep, to the bit."""
    one_by_one = partial(HopperMachine, together=1, order="random")
    runs = [
        attended(TritonOps("sm_90", machine, pipelined=True), CAUSAL)[1:]
        for machine in (HopperMachine, one_by_one)
    ]
    assert all(map(torch.equal, *runs))


@needs_gluon
def test_a_result_without_a_state() -> None:
    from usp.kernels.arguments import KernelOptions
    from usp.kernels.attention_forward import attention_forward

    ops = TritonOps("sm_90", pipelined=True)
    x, out, lse = attended(ops, CAUSAL)
    result, last = torch.full_like(out, torch.nan, dtype=CAUSAL.dtype), torch.empty_like(lse)
    shared = KernelOptions(*options(CAUSAL, x, slice(None), masked=True))
    last.fill_(-torch.inf)
    ops.call(attention_forward, x.q, x.k, x.v, shared, None, last, result, written=(last, result))
    assert torch.equal(result, out.to(CAUSAL.dtype)) and torch.equal(last, lse)


@needs_gluon
def test_three_blocks_equal_one() -> None:
    case = replace(CAUSAL, lk=300, span="all")
    ops = TritonOps("sm_90", pipelined=True)
    whole, parts = whole_and_in_blocks(case, make_inputs(case), ops)
    torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-6, atol=1e-6)


# -- what passes over memory once


def test_merge() -> None:
    from usp.kernels.state_merge import merge_into
    from usp.ops.merge import merge

    torch.manual_seed(0)
    out, lse = torch.randn(2, 37, 3, 24), torch.randn(2, 3, 37)
    more_out, more_lse = torch.randn(2, 3, 37, 24).bfloat16().transpose(1, 2), torch.randn(2, 3, 37)
    lse[:, :, :9] = more_lse[:, :, 5:13] = -torch.inf
    out[:, :9] = 0
    wanted = merge(out.double(), lse.double(), more_out.double(), more_lse.double())
    TritonOps("sm_90").call(merge_into, out, lse, more_out, more_lse, written=(out, lse))
    torch.testing.assert_close(out.double(), wanted[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-6, atol=1e-6)


def test_heads_into_a_message() -> None:
    from usp.kernels.pack import copy_pieces

    source = torch.arange(2 * 13 * 7 * 5).view(2, 7, 13, 5).transpose(1, 2).bfloat16()
    pieces = [source[:, :, :3], source[:, :, 3:4], source[:, :, 4:]]
    message = torch.full((source.numel() + 3,), torch.nan, dtype=source.dtype)
    parts = message[3:].split([piece.numel() for piece in pieces])
    targets = [part.view(piece.shape) for part, piece in zip(parts, pieces, strict=True)]
    TritonOps("sm_80").call(copy_pieces, pieces, targets, written=[source, message[3:]])
    for target, piece in zip(targets, pieces, strict=True):
        assert torch.equal(target, piece)
    assert message[:3].isnan().all()


def test_delta() -> None:
    from usp.kernels.attention_delta import launch_delta

    dout, out = torch.randn(2, 19, 3, 72).half(), torch.randn(2, 19, 3, 72)
    delta = torch.full((2, 3, 19), torch.nan)
    TritonOps("sm_80").call(launch_delta, dout, out, delta, written=[delta])
    wanted = (dout.double() * out.double()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(delta.double(), wanted, rtol=1e-5, atol=1e-5)


# -- broken on purpose

# Of the forward kernel: what is changed in its text, and what comes of it.
PIPELINED: dict[str, tuple[str, str, str]] = {
    "keys are not waited for": (r"mbarrier\.try_wait\S+ (\w+), .*;", r"mov.pred \1, -1;", "is off"),
    "another swizzle": ("4611686293305294848", "9223372311732682752", "pattern|is off"),
    "products are not waited for": (r"(wgmma\.wait_group\S+\s+)\d", r"\g<1>7", "run on|is off"),
    "no room is made": (r"^.*mbarrier\.arrive\.shared.*;", "", "can go on"),
    "too few bytes": (r"(mbarrier\.arrive\.expect_tx.*, )\d+;", r"\g<1>1024;", "can go on"),
    "another order of numbers": (r"(wgmma[^;]*, 1, 1, 0, )0;", r"\g<1>1;", "is off"),
}
PORTABLE: dict[str, tuple[str, str, str]] = {
    "stores of another proxy": (r"fence\.proxy\.async\S*;", ";", "fence.proxy"),
    "registers may not be ready": (r"wgmma\.fence\S*;", ";", "wgmma.fence"),
    "copies are not waited for": (r"cp\.async\.wait_group\s+\d", "cp.async.wait_group 9", "is off"),
}
BROKEN = [(True, *x) for x in PIPELINED.values()] + [(False, *x) for x in PORTABLE.values()]


@pytest.mark.parametrize(
    ("pipelined", "pattern", "new", "message"), BROKEN, ids=[*PIPELINED, *PORTABLE]
)
@needs_gluon
def test_broken(pipelined: bool, pattern: str, new: str, message: str) -> None:
    ops = TritonOps("sm_90", edit=lambda e: e.edited(pattern, new), pipelined=pipelined)
    with pytest.raises((AssertionError, ptx.Refused, ValueError), match=message):
        x, out, _ = attended(ops, CAUSAL)
        assert largest(out - expected(CAUSAL, x)["out"]) <= 1e-2, "out is off"


@pytest.mark.parametrize("g", ["blh", "blhd"])
@pytest.mark.parametrize("family", ["sm_80", "sm_90"])
def test_linear_attention(family: str, g: str) -> None:
    channels = g == "blhd"
    heads, length = ((1, 1, 1), 35) if channels else ((1, 1, 2), 70)
    walk = Walk(batch=1, length=length, heads=heads, dims=(16, 16), dtype=torch.bfloat16, g=g)
    with executed(family) as launched:
        found = results(triton, *walk.inputs())
    assert_walk(walk, found, TOLERANCE, rounds=True)
    others = {"pairs_kernel", "channel_gradients_kernel"} if channels else {"decay_kernel"}
    assert set(launched) == {"states_kernel", "read_kernel"} | others
