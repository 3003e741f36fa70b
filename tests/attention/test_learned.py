"""Options given as tensors: a learned scale has its gradient, what has none says so."""

from __future__ import annotations

import copy
from typing import Any

import pool as worker
import pytest
import torch
from torch import Tensor, nn

import usp
from usp.testing import dense_attention

OPTIONS: dict[str, Any] = {"causal": True, "softcap": 3.0}


def qkv(length: int = 11) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = (2, length, 4, 5), (2, length, 2, 5), (2, length, 2, 3), (2, length, 4, 3)
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]


def expected(scale: float) -> list[Tensor]:
    *inputs, dout = qkv()
    leaves = [
        *(x.requires_grad_() for x in inputs),
        torch.tensor(scale, dtype=torch.float64, requires_grad=True),
    ]
    out, _ = dense_attention(*leaves[:3], softmax_scale=leaves[3], **OPTIONS)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("scale", [0.3, 0.0, -1.7])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_gradient_of_a_scale(scale: float, shape: tuple[int, ...]) -> None:
    *inputs, dout = qkv()
    factor = torch.full(shape, scale, dtype=torch.float64).requires_grad_()
    leaves = [*(x.requires_grad_() for x in inputs), factor]
    out = usp.long_context_attention(*leaves[:3], softmax_scale=factor, **OPTIONS)
    got = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    for a, b in zip(got, expected(scale), strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_is_rounded_to_no_low_precision(dtype: torch.dtype) -> None:
    """Its gradient is a sum over everything, taken in fp32."""
    *inputs, dout = (x.to(dtype) for x in qkv())
    scale = nn.Parameter(torch.tensor(0.3))
    usp.long_context_attention(*inputs, softmax_scale=scale, **OPTIONS).backward(dout)
    right = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    out, _ = dense_attention(*inputs, softmax_scale=right, **OPTIONS)
    out.backward(dout.double())
    assert scale.grad.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(scale.grad.double(), right.grad, rtol=tolerance, atol=tolerance)


def learned(ulysses: int, ring: int) -> tuple[Tensor, Tensor]:
    mesh = worker.mesh(ulysses, ring)
    scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    module = usp.LongContextAttention(mesh, softmax_scale=scale, seq_len=11, **OPTIONS)
    assert list(module.parameters()) == [scale]
    q, k, v, dout = (usp.shard_sequence(x, mesh, 1) for x in qkv())
    module(q, k, v).backward(dout)
    twin = copy.deepcopy(module)
    assert next(twin.parameters()) is not scale
    return scale.grad, twin(q, k, v).detach()


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 2)])
def test_a_module_learns_its_scale(pool, mesh: tuple[int, int]) -> None:
    found = pool.run(learned, *mesh, ranks=mesh[0] * mesh[1])
    out, *_, dscale = expected(0.3)
    torch.testing.assert_close(sum(part for part, _ in found), dscale, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat([o for _, o in found], 1), out, rtol=1e-9, atol=1e-9)


def test_compiled_learns_too() -> None:
    *inputs, dout = qkv()
    scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    module = usp.LongContextAttention(softmax_scale=scale, **OPTIONS)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(*inputs).backward(dout)
    torch.testing.assert_close(scale.grad, expected(0.3)[-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["softcap", "dropout_p"])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_has_no_gradient_says_so(name: str, compiled: bool) -> None:
    q, k, v, _ = qkv()
    number = torch.tensor(0.5, requires_grad=True)

    def attend() -> Tensor:
        return usp.long_context_attention(q, k, v, **{name: number})

    with pytest.raises(Exception, match=rf"{name}.*no gradient.*item\(\)"):
        (torch.compile(attend, backend="aot_eager") if compiled else attend)()


def test_a_scale_is_one_number() -> None:
    q, k, v, _ = qkv()
    with pytest.raises(TypeError, match="softmax_scale"):
        usp.long_context_attention(q, k, v, softmax_scale=torch.ones(4))
