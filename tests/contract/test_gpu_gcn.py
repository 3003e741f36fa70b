"""AMD's machine code of a real build, executed: gfx90a and gfx942, against dense attention.

Their host code launches as it would on a GPU; ``gcn`` executes what clang has made of the kernels.
A touch of anything but the tensors' elements, a register read while its load is under way, or an
instruction that it does not know, ends a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gcn.assembly import Kernel, parse_line
from gcn.machine import Order
from gcn.wave import Hazard
from gcn_ops import GcnMoves, GcnOps, Programs
from gpu_builds import BUILD_TIMEOUT_S, Builds
from gpu_checks import Subject, assert_merged, assert_packed
from gpu_emulated import emulated_ops
from move_ops import implementation, library
from native_case import Case, assert_right, computed, make_inputs, new_state, options
from test_attention_delta import assert_products, randn
from test_gpu_kernels import GUARD, LSE_TOLERANCE, TOLERANCE, guarded

pytestmark = pytest.mark.timeout(BUILD_TIMEOUT_S + 300)

TARGETS = ("gfx90a", "gfx942")
# As late and as early as the program allows, and the waves of a workgroup in either order.
ORDERS = (Order(late=True), Order(late=False, descending=True), Order(late=True, descending=True))
# gfx90a takes denormals in products for 0: inputs of fp16 below 2^-14.
FLUSHED_LSE_TOLERANCE = 5e-5


@dataclass(frozen=True)
class Machine:
    """One target's machine code."""

    assembly: tuple[Path, ...]
    programs: Programs
    moves: tuple[Any, Path]

    @property
    def target(self) -> str:
        return self.programs.target

    def ops(self, order: Order) -> GcnOps:
        return GcnOps(emulated_ops(64), self.programs, order)

    def move_ops(self, order: Order) -> GcnMoves:
        return GcnMoves(*self.moves, self.programs, order)

    def lse_tolerance(self, dtype: torch.dtype) -> float:
        flushes = self.target == "gfx90a" and dtype == torch.float16
        return FLUSHED_LSE_TOLERANCE if flushes else LSE_TOLERANCE


@pytest.fixture(scope="module", params=TARGETS)
def machine(
    request: pytest.FixtureRequest,
    gpu_builds: Builds,
    tmp_path_factory: pytest.TempPathFactory,
) -> Machine:
    assembly = tuple(gpu_builds.of("hip").assembly(request.param))
    folder = tmp_path_factory.mktemp("moves")
    moves = implementation("gpu_64", folder), library("gpu_64", folder)
    return Machine(assembly, Programs(assembly, request.param), moves)


BRAIN = torch.bfloat16
SMALL = Case(
    batch=1, lq=37, lk=67, heads=(2, 0, 2), head_dim=64, value_head_dim=64, dtype=torch.float16
)
CASES: dict[str, dict[str, Any]] = {
    # both sizes of the matrix instruction, every padded head dim
    "d32": {"head_dim": 32, "value_head_dim": 32, "dtype": BRAIN, "span": "causal"},
    "d64": {"heads": (3, 1, 2)},
    "d64_blocks_and_steps": {"lq": 131, "lk": 149, "dtype": BRAIN, "heads": (1, 0, 1)},
    "d96": {"head_dim": 96, "value_head_dim": 72, "layout": "sliced", "span": "window"},
    "d128": {"head_dim": 128, "value_head_dim": 128, "dtype": BRAIN, "span": "causal"},
    "d192": {"head_dim": 192, "value_head_dim": 128, "heads": (1, 0, 1)},
    "d256": {"head_dim": 256, "value_head_dim": 256, "dtype": BRAIN, "heads": (1, 0, 1)},
    "d256_options": {"head_dim": 160, "value_head_dim": 256, "heads": (1, 0, 1), "softcap": 3.0},
    "d128_options": {"head_dim": 72, "value_head_dim": 128, "bias": "BHQK", "dtype": BRAIN},
    # what is carried, seen and strided
    "carried_state": {"prior_keys": 41, "span": "random", "batch": 2, "dtype": BRAIN},
    "gaps": {"span": "gaps", "lk": 131, "layout": "heads_first"},
    "rows_that_see_nothing": {"span": "strictly_causal", "dtype": BRAIN, "layout": "expanded"},
    "numbers_not_vectors": {"head_dim": 61, "value_head_dim": 37, "span": "documents"},
    # options
    "bias": {"bias": "B1QK", "batch": 2, "heads": (1, 0, 1), "dtype": BRAIN},
    "padding": {"bias": "B11K", "bias_holes": True, "span": "causal"},
    "alibi": {"alibi": "1H", "span": "causal"},
    "softcap": {"softcap": 1.5, "dtype": BRAIN},
    "dropout": {"dropout_p": 0.3},
    "everything": {
        "lq": 31,
        "lk": 53,
        "batch": 2,
        "heads": (1, 3, 4),
        "span": "causal",
        "bias": "1HQK",
        "alibi": "BH",
        "softcap": 2.0,
        "dropout_p": 0.2,
        "prior_keys": 23,
        "value_head_dim": 9,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_dense_one(name: str, machine: Machine) -> None:
    case = replace(SMALL, **CASES[name])
    x = make_inputs(case)
    order = ORDERS[(list(CASES).index(name) + TARGETS.index(machine.target)) % 3]
    got = computed(case, x, machine.ops(order))
    assert_right(case, x, got, TOLERANCE[case.dtype], machine.lse_tolerance(case.dtype))


def test_the_same_bits_in_any_order(machine: Machine) -> None:
    case = replace(SMALL, heads=(1, 0, 1), span="causal", alibi="1H", dropout_p=0.25)
    x = make_inputs(case)
    results = [computed(case, x, machine.ops(order)) for order in ORDERS]
    for got in results[1:]:
        for name, reference in results[0].items():
            assert torch.equal(got[name], reference), name


def without(start: str) -> Callable[[Kernel], Kernel]:
    """A kernel whose instructions that start so do nothing."""

    def edit(kernel: Kernel) -> Kernel:
        nothing = parse_line("s_nop 0")
        left = tuple(nothing if x.text.startswith(start) else x for x in kernel.instructions)
        assert left != kernel.instructions
        return replace(kernel, instructions=left)

    return edit


@pytest.mark.parametrize("start", ["s_barrier", "s_waitcnt vmcnt", "s_waitcnt lgkmcnt"])
def test_a_kernel_without_its_waits_is_caught(start: str, machine: Machine) -> None:
    case = replace(SMALL, dtype=torch.bfloat16, lk=131, heads=(1, 0, 1))
    x, edited = make_inputs(case), Programs(machine.assembly, machine.target, without(start))
    ops = GcnOps(emulated_ops(64), edited, Order())
    if start == "s_barrier":
        got = computed(case, x, ops)
        with pytest.raises(AssertionError, match=" is off by "):
            assert_right(case, x, got, TOLERANCE[case.dtype])
    else:
        with pytest.raises(Hazard, match="under way"):
            computed(case, x, ops)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_result_is_the_new_out_rounded(dtype: torch.dtype, machine: Machine) -> None:
    case = replace(SMALL, dtype=dtype, span="strictly_causal")
    x, ops = make_inputs(case), machine.ops(Order())
    shared = options(case, x, slice(None), masked=True)
    (out, lse), last_lse = new_state(case), torch.full((1, 2, case.lq), torch.nan)
    result, around = guarded(out.shape, torch.nan, dtype)
    ops.attention_forward(x.q, x.k, x.v, *shared, None, last_lse, result)
    ops.attention_forward(x.q, x.k, x.v, *shared, out, lse)
    assert torch.equal(lse, last_lse)
    assert torch.equal(result, out.to(dtype))
    assert (around == torch.tensor(GUARD, dtype=dtype)).sum() == around.numel() - result.numel()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [7, 64, 264])
def test_delta(width: int, dtype: torch.dtype, machine: Machine) -> None:
    shape = (2, 31, 3, width)
    assert_products(machine.move_ops(ORDERS[1]), randn(shape, dtype, 1), randn(shape, dtype, 2))


@pytest.mark.parametrize("dtype", [torch.float32, *TOLERANCE], ids=str)
def test_merge(dtype: torch.dtype, machine: Machine) -> None:
    assert_merged(Subject("native", "cpu"), machine.move_ops(ORDERS[2]).state_merge, dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64], ids=str)
def test_pack(dtype: torch.dtype, machine: Machine) -> None:
    assert_packed(Subject("native", "cpu"), machine.move_ops(ORDERS[0]).pack, dtype)


def test_unpack(machine: Machine) -> None:
    ops = machine.move_ops(ORDERS[0])
    whole = torch.full((2, 29, 6, 16), 7.0, dtype=torch.bfloat16)
    parts = [whole[:, :, 1:3], whole[:, 3:8, 4:5]]
    message = torch.arange(sum(x.numel() for x in parts)).bfloat16()
    ops.unpack(message.view(torch.uint8), parts)
    assert torch.equal(torch.cat([x.flatten() for x in parts]), message)
    assert (whole == 7).sum() >= whole.numel() - message.numel()
