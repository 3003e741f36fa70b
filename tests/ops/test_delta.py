"""delta in plain torch: right, whatever is computed at a time."""

from __future__ import annotations

import pytest
import torch

from usp.ops import delta


@pytest.mark.parametrize("at_once", [1, 100, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_row_products(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, at_once: int) -> None:
    monkeypatch.setattr(delta, "_AT_ONCE", at_once)
    dout, out = (torch.randn(2, 7, 3, 5, dtype=dtype) for _ in range(2))
    state = torch.float64 if dtype == torch.float64 else torch.float32
    found = delta.row_products(dout, out, state)
    want = torch.einsum("bihd,bihd->bhi", dout.double(), out.double())
    assert found.dtype == state and found.is_contiguous()
    torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-5)


def test_without_rows() -> None:
    assert delta.row_products(
        torch.empty(2, 0, 3, 5), torch.empty(2, 0, 3, 5), torch.float32
    ).shape == (2, 3, 0)
