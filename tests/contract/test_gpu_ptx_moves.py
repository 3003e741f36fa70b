"""What nvcc makes of the kernels that pass over memory once, executed; see test_gpu_ptx.py."""

from __future__ import annotations

from typing import Any

import ptx
import pytest
import torch
from gpu_builds import BUILD_TIMEOUT_S, Builds
from move_checks import (
    assert_merged,
    assert_products,
    assert_there_and_back,
    filled,
    message_of,
    parts,
    randn,
    random_bytes,
)
from move_ops import implementation, library
from ptx_ops import Kernels, PtxMoves

from usp.ops.merge import merge

pytestmark = [pytest.mark.device_code, pytest.mark.timeout(BUILD_TIMEOUT_S + 300)]
SOURCES = ("attention_delta", "state_merge", "pack")


def machine(memory: ptx.Memory) -> ptx.Machine:
    return ptx.Machine(memory, "descending", races=True)


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def moves(
    request: pytest.FixtureRequest,
    gpu_builds: Builds,
    tmp_path_factory: pytest.TempPathFactory,
) -> PtxMoves:
    built = gpu_builds.of("cuda")
    kernels = Kernels(built.ptx(source, request.param) for source in SOURCES)
    folder = tmp_path_factory.mktemp("gpu_32")
    ops = implementation("gpu_32", folder)
    return PtxMoves(ops, library("gpu_32", folder), kernels.on(machine))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 40, 61, 264])
def test_delta(moves: PtxMoves, width: int, dtype: torch.dtype) -> None:
    shape = (2, 17, 3, width)
    assert_products(moves, randn(shape, dtype, 1), randn(shape, dtype, 2))
    wide = torch.full((2, 3, 19, 2 * width), torch.nan, dtype=dtype)
    strided = wide.transpose(1, 2)[:, :17, :, width:].copy_(randn(shape, dtype, 3))
    assert_products(moves, strided, randn(shape, dtype, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [13, 40])
def test_merge(moves: PtxMoves, head_dim: int, dtype: torch.dtype) -> None:
    """Into some rows of a state, from a result whose heads come first."""
    out, lse, more_out, more_lse = parts(torch.float32, dtype, head_dim)
    want = merge(*(x.double() for x in (out, lse, more_out, more_lse)))
    whole = torch.full((2, 80, 5, head_dim), torch.nan)
    whole[:, 3:74] = out
    heads_first = more_out.transpose(1, 2).contiguous().transpose(1, 2)
    moves.state_merge(whole[:, 3:74], lse, heads_first, more_lse)
    assert_merged(whole[:, 3:74], lse, *want)
    assert whole[:, :3].isnan().all()
    assert whole[:, 74:].isnan().all()


def exchanged() -> list[Any]:
    q, k = filled((2, 17, 6, 40), torch.bfloat16, 1), filled((2, 17, 2, 40), torch.bfloat16, 2)
    heads = [part for r in range(2) for part in (q[:, :, 3 * r : 3 * r + 3], k[:, :, r : r + 1])]
    odd = [filled((3, 5), torch.uint8, 3)]  # what follows lies askew
    others = [filled((7, 3), dtype, 4) for dtype in (torch.float64, torch.float32, torch.bool)]
    return [heads, odd + heads + others, [random_bytes(3 * 4099).view(3, 4099)[:, 5:]]]


@pytest.mark.parametrize("tensors", exchanged(), ids=["heads", "askew", "runs"])
def test_exchange(moves: PtxMoves, tensors: list[torch.Tensor]) -> None:
    assert_there_and_back(moves, tensors)


def test_more_tensors_than_one_launch_takes(moves: PtxMoves) -> None:
    assert_there_and_back(moves, [filled((n, 3), torch.bfloat16, n) for n in range(1, 35)])


def test_every_kernel_has_run(moves: PtxMoves) -> None:
    """By the tests above; alone, this one has them run."""
    for width in (1, 40):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            shape = (1, 2, 1, width)
            if dtype != torch.float32:
                moves.attention_delta(
                    randn(shape, dtype, 1), randn(shape, dtype, 2), torch.empty(1, 1, 2)
                )
            state = (torch.zeros(shape), torch.zeros(1, 1, 2))
            moves.state_merge(*state, randn(shape, dtype, 1), torch.zeros(1, 1, 2))
    message = torch.empty(4, dtype=torch.uint8)
    moves.pack([filled((4,), torch.uint8)], message)
    moves.unpack(message, [filled((4,), torch.uint8)])
    assert torch.equal(message, message_of([filled((4,), torch.uint8)]))
    assert set(moves.kernels.launched) == set(moves.kernels.entries)
