"""Why the compiled kernels say that they cannot take a problem, on devices that are not here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from usp.backends import native
from usp.ops import native as ops
from usp.planning.problem import Traits

ON_GPU = Traits(
    device_type="cuda", dtype=torch.bfloat16, head_dim=128, value_head_dim=64, softmax_scale=0.1
)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """build("cpu", "cuda"): as if the library were there, with kernels for these devices."""

    def pretend(*devices: str) -> None:
        monkeypatch.setattr(ops, "load_error", lambda: None)
        monkeypatch.setattr(ops, "is_there", lambda name, device: device in devices)

    return pretend


def test_takes_bf16_and_fp16_on_a_gpu(build: Callable[..., None]) -> None:
    build("cpu", "cuda")
    for dtype in (torch.bfloat16, torch.float16):
        traits = replace(ON_GPU, dtype=dtype, bias=True, softcap=True, alibi=True, dropout=True)
        assert native.reasons_against(traits) == ()
    assert native.reasons_against(replace(ON_GPU, head_dim=256, value_head_dim=256)) == ()


def test_says_what_the_gpu_kernels_do_not_take(build: Callable[..., None]) -> None:
    build("cpu", "cuda")
    (reason,) = native.reasons_against(replace(ON_GPU, dtype=torch.float32))
    assert "take bf16 and fp16, q is torch.float32" in reason
    (reason,) = native.reasons_against(replace(ON_GPU, value_head_dim=257))
    assert "up to 256, not 257" in reason
    on_cpu = replace(ON_GPU, device_type="cpu", dtype=torch.float64, head_dim=512)
    assert native.reasons_against(on_cpu) == ()


def test_says_which_device_it_was_not_built_for(build: Callable[..., None]) -> None:
    build("cpu")
    (reason,) = native.reasons_against(ON_GPU)
    assert "built without kernels for cuda tensors" in reason


def test_says_that_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "load_error", lambda: "no library")
    (reason,) = native.reasons_against(ON_GPU)
    assert "not there: no library" in reason
