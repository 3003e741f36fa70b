"""AMD's machine code beside the contract: waits taken out must show; delta, merge, pack."""

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
from kernel_call import assert_right, computed, make_inputs
from move_checks import assert_products, randn
from move_ops import implementation, library
from subjects.gcn import ORDERS, SUBJECTS, TARGETS, TOLERANCE, programs_for

pytestmark = [pytest.mark.device_code, pytest.mark.timeout(BUILD_TIMEOUT_S + 300)]
SMALL = SUBJECTS[0].base


@dataclass(frozen=True)
class Machine:
    """One target's machine code."""

    assembly: tuple[Path, ...]
    programs: Programs
    moves: tuple[Any, Path]

    @property
    def target(self) -> str:
        return self.programs.target

    def move_ops(self, order: Order) -> GcnMoves:
        return GcnMoves(*self.moves, self.programs, order)


@pytest.fixture(scope="module", params=TARGETS)
def machine(
    request: pytest.FixtureRequest,
    gpu_builds: Builds,
    tmp_path_factory: pytest.TempPathFactory,
) -> Machine:
    assembly = tuple(gpu_builds.of("hip").assembly(request.param))
    folder = tmp_path_factory.mktemp("moves")
    moves = implementation("gpu_64", folder), library("gpu_64", folder)
    return Machine(assembly, programs_for(request.param, gpu_builds), moves)


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
