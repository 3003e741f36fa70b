"""torch's own kernels of these ops are not here; what they take and answer is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from usp.backends.library import aten
from usp.backends.library.call import How, Packed

# the ops' shapes alone, and their fakes on a GPU that need not be there
DEVICES = {"meta": nullcontext, "cuda": FakeTensorMode}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with DEVICES[request.param]():
        yield request.param


def on(device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.empty(shape, device=device, dtype=torch.bfloat16) for shape in shapes]


def shapes(*tensors: Tensor) -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in tensors]


@pytest.mark.parametrize("name", ["Flash", "Cudnn", "Efficient"])
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(name: str, causal: bool, device: str) -> None:
    """By torch's meta kernels: those of the adapter's promise, for odd lengths."""
    kernel, heads = getattr(aten, name)(), 2 if name == "Flash" else 4
    m = 70 if causal else 101
    q, k, v = on(device, (2, 70, 4, 64), (2, m, heads, 64), (2, m, heads, 64))
    how = How(0.125, right=0) if causal else How(0.125)
    out, lse = kernel.forward(q, k, v, how)
    assert shapes(out, lse) == [(2, 70, 4, 64), (2, 4, 70)]
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert out.device.type == lse.device.type == device
    if name == "Efficient":
        return  # torch's own meta kernel of its backward fails
    grads = kernel.backward(torch.empty_like(q), q, k, v, out, lse.contiguous(), how, None)
    assert shapes(*grads) == shapes(q, k, v)


def test_shapes_of_packed_calls(device: str) -> None:
    cu = torch.empty(4, device=device, dtype=torch.int32)
    how = How(0.125, left=7, right=0, packed=Packed(cu, cu, 40, 50))
    q, k, v = on(device, (90, 4, 64), (100, 2, 64), (100, 2, 64))
    out, lse = aten.Flash().forward(q, k, v, how)
    assert shapes(out, lse) == [(90, 4, 64), (4, 90)]
    grads = aten.Flash().backward(torch.empty_like(q), q, k, v, out, lse, how, None)
    assert shapes(*grads) == shapes(q, k, v)


def test_a_window_is_said_in_full_or_not_at_all() -> None:
    """On ROCm any number is one."""
    assert aten._window(How(1.0)) == aten._window(How(1.0, right=0)) == {}
    assert aten._window(How(1.0, left=3)) == {"window_size_left": 3, "window_size_right": -1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_torch_without_them_says_so() -> None:
    load = aten.loader(aten.Flash, "_flash_attention_forward")
    if torch.version.cuda is None and torch.version.hip is None:
        with pytest.raises(aten.Missing, match="was built without _flash_attention_forward"):
            load()
    else:
        assert isinstance(load(), aten.Flash)
