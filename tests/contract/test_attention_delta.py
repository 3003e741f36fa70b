"""``usp::attention_delta``: sums of dout * out, by the CPU's kernel and by the GPU's source."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from move_checks import assert_products, randn
from move_ops import SUBJECTS, implementation

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=SUBJECTS)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return implementation(request.param, tmp_path_factory.mktemp(request.param))


# By numbers, by vectors, in several rounds; blocks that are not full.
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 8, 40, 61, 128, 264, 521])
def test_it_is_the_sum_of_products(kernels: Any, width: int, dtype: torch.dtype) -> None:
    shape = (2, 67, 3, width)
    assert_products(kernels, randn(shape, dtype, 1), randn(shape, dtype, 2))


@pytest.mark.parametrize("width", [13, 16])
def test_strided_views(kernels: Any, width: int) -> None:
    wide = randn((2, 3, 71, width), torch.bfloat16, 3)
    out = randn((2, 142, 3, 2, width), torch.bfloat16, 4)[:, ::2, :, 1]
    assert_products(kernels, wide.transpose(1, 2), out)
    same = randn((width,), torch.bfloat16, 5).expand(out.shape)
    assert_products(kernels, wide.transpose(1, 2), same)


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0)])
def test_nothing(kernels: Any, shape: tuple[int, ...]) -> None:
    assert_products(kernels, torch.zeros(shape).bfloat16(), torch.zeros(shape).bfloat16())


@pytest.mark.parametrize("far", [0, 1, 2])
def test_elements_past_2_to_the_31(kernels: Any, far: int) -> None:
    """Only the pages that are used come into being."""
    gap, width = 2**30 + 16, 24
    strides = [72, 24, 144]
    strides[far] = gap
    shape = (3, 3, 2, width) if far < 2 else (1, 2, 3, width)
    memory = torch.empty(3 * gap, dtype=torch.bfloat16)
    dout = memory.as_strided(shape, (*strides, 1)).copy_(randn(shape, torch.bfloat16, 6))
    assert_products(kernels, dout, randn(shape, torch.bfloat16, 7))
    assert_products(kernels, randn(shape, torch.bfloat16, 8), dout)


def test_refusals(kernels: Any) -> None:
    out, delta = torch.zeros(2, 3, 4, 5).bfloat16(), torch.zeros(2, 4, 3)
    compute = kernels.attention_delta
    with pytest.raises(RuntimeError, match=r"out: dim 3 \(Dv\) is 6, but dout has Dv = 5"):
        compute(out, torch.zeros(2, 3, 4, 6).bfloat16(), delta)
    with pytest.raises(RuntimeError, match="out is Half, expected BFloat16"):
        compute(out, out.half(), delta)
    with pytest.raises(RuntimeError, match=r"delta: dim 1 \(H\) is 3, but dout has H = 4"):
        compute(out, out, torch.zeros(2, 3, 4))
    with pytest.raises(RuntimeError, match="delta is not contiguous"):
        compute(out, out, torch.zeros(2, 3, 4).transpose(1, 2))
    if kernels is not torch.ops.usp:
        with pytest.raises(RuntimeError, match="neither bfloat16 nor float16"):
            compute(out.float(), out.float(), delta)
