"""What is checked of a library before it is used: its adapter passes, a wrong kernel does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import stand_ins
import torch
from library_cases import label, on_cpu

from usp.backends import _self_check
from usp.backends._self_check import wrong_with
from usp.backends.library.record import Record
from usp.backends.library.table import ROWS
from usp.planning.problem import Traits

CPU = torch.device("cpu")
FP16 = Traits("cpu", torch.float16, 16, 16, 0.25)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All masks, in the sizes of a CPU."""
    sizes = replace(_self_check.ON_CPU, masks=_self_check.ON_GPU.masks)
    monkeypatch.setattr(_self_check, "ON_CPU", sizes)


@pytest.mark.parametrize("record", ROWS, ids=label)
def test_adapters_pass(record: Record) -> None:
    for softcap in {False, record.softcap}:
        assert wrong_with(on_cpu(record), replace(FP16, softcap=softcap), CPU) is None


def without_left(causal: bool, left: int, right: int) -> tuple[None, int | None]:
    """As AMD's kernels of flash-attn 2.8.3 have it: a window is taken and ignored."""
    return None, 0 if causal else right if right >= 0 else None


def from_top_left(q: Any, k: Any, scale: float, left: Any, right: Any, softcap: float = 0.0) -> Any:
    apart = k.shape[1] - q.shape[1]
    left, right = (
        (None if left is None else left + apart),
        (None if right is None else right - apart),
    )
    return bottom_right(q, k, scale, left, right, softcap)


def without_softcap(
    q: Any, k: Any, scale: float, left: Any, right: Any, softcap: float = 0.0
) -> Any:
    return bottom_right(q, k, scale, left, right)


def packed_and_doubled(*args: Any) -> Any:
    return [2 * x for x in packed_backward(*args)]


bottom_right, packed_backward = stand_ins.scores_of, stand_ins.packed_backward


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("bounds", without_left, "(a window)"),
        ("scores_of", from_top_left, "(causal, fewer queries than keys)"),
        ("scores_of", without_softcap, "is off by"),
        ("packed_backward", packed_and_doubled, "(documents)"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_a_kernel_ignores_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., Any], said: str
) -> None:
    monkeypatch.setattr(stand_ins, name, wrong)
    traits = replace(FP16, softcap=wrong is without_softcap)
    found = wrong_with(on_cpu(ROWS[0]), traits, CPU)
    assert found is not None and said in found
