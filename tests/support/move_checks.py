"""What is right of the ops that pass over memory once: delta, merge, pack and unpack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

B, L, H = 2, 71, 5  # more rows than one task of a thread takes, or one block of a GPU
TOLERANCE = {torch.float32: 3e-7, torch.float64: 1e-15}


def randn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_products(kernels: Any, dout: Tensor, out: Tensor) -> None:
    batch, rows, heads, width = out.shape
    margin, count = 64, batch * heads * rows
    around = torch.full((count + 2 * margin,), torch.nan)
    delta = around[margin : margin + count].view(batch, heads, rows)
    kernels.attention_delta(dout, out, delta)
    want = (dout.double() * out.double()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(delta.double(), want, rtol=0, atol=2e-6 * max(1, width))
    assert around.isnan().sum() == 2 * margin


def parts(
    dtype: torch.dtype, more_dtype: torch.dtype, D: int = 13
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two partial results with rows that saw nothing in the one, the other and both."""
    generator = torch.Generator().manual_seed(5)
    out, more_out = (torch.randn(B, L, H, D, generator=generator, dtype=dtype) for _ in range(2))
    lse, more_lse = (8 * torch.randn(B, H, L, generator=generator, dtype=dtype) for _ in range(2))
    more_lse[0, 0, :9] += 200  # one side decides
    for rows, a, b in ((slice(10, 14), out, lse), (slice(12, 17), more_out, more_lse)):
        a[:, rows], b[:, :, rows] = 0, -torch.inf
    return out, lse, more_out.to(more_dtype), more_lse


def assert_merged(out: Tensor, lse: Tensor, want_out: Tensor, want_lse: Tensor) -> None:
    empty = want_lse == -torch.inf
    assert empty.any()
    assert torch.equal(lse == -torch.inf, empty)
    assert torch.all(out[empty.transpose(1, 2)] == 0)
    tolerance = TOLERANCE[lse.dtype]
    assert (out - want_out).abs().max() <= 4 * tolerance
    assert torch.where(empty, 0, (lse - want_lse) / want_lse.abs().clamp(min=1)).abs().max() <= (
        tolerance
    )


def random_bytes(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)


def filled(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bits, NaNs and all (0 and 1 for bool)."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = random_bytes(count, seed) % 2 if dtype == torch.bool else random_bytes(count, seed)
    return raw.view(dtype).view(tuple(shape))


def message_of(tensors: Sequence[Tensor]) -> Tensor:
    parts = [t.clone(memory_format=torch.contiguous_format).flatten() for t in tensors]
    return torch.cat([part.view(torch.uint8) for part in parts])


def assert_there_and_back(kernels: Any, tensors: Sequence[Tensor]) -> None:
    """The message is that of torch; what comes back is what went in, and nothing else changes."""
    want = message_of(tensors)
    message = torch.empty_like(want)
    kernels.pack(tensors, message)
    assert torch.equal(message, want)
    wholes = [torch.full((t.untyped_storage().nbytes(),), 7, dtype=torch.uint8) for t in tensors]
    views = [
        whole.view(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset())
        for whole, t in zip(wholes, tensors, strict=True)
    ]
    kernels.unpack(message, views)
    assert torch.equal(message_of(views), want)
    for whole, view in zip(wholes, views, strict=True):
        view.view(torch.uint8 if view.dtype == torch.bool else view.dtype).zero_()
        outside = whole.numel() - view.numel() * view.dtype.itemsize
        assert (whole == 7).sum() == outside
