"""Attention in chunks on a GPU: what waits on the host comes back, by copies beside the kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import usp

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("ways", [{"chunks": 4}, {"chunks": 3, "head_chunks": 2}])
def test_what_waits_on_the_host_comes_back(device: str, ways: dict) -> None:
    """Not rounded anew, a second time through the same rooms, and pinned meanwhile."""
    random = torch.Generator().manual_seed(0)
    length = 1021 if device == "cuda" else 61

    def drawn(heads: int) -> Tensor:
        return torch.randn(2, length, heads, 32, generator=random).to(device, torch.bfloat16)

    leaves, dout = [drawn(heads).requires_grad_() for heads in (4, 2, 2)], drawn(4)
    plain = usp.long_context_attention(*leaves, causal=True)
    expected = [plain, *torch.autograd.grad(plain, leaves, dout)]
    for _ in range(3):
        out = usp.long_context_attention(*leaves, causal=True, offload="cpu", **ways)
        assert out.grad_fn is not None
        kept = [x for x in out.grad_fn.saved_tensors if x is not None and x.numel()]
        if device == "cuda":
            assert all(x.is_pinned() for x in kept)
        found = [out, *torch.autograd.grad(out, leaves, dout)]
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)
