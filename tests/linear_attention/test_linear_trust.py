"""Kernels of linear attention are tried before a GPU uses them; here a CPU plays the GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import recurrent_family as family
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import usp
from usp.linear_attention import families, trust
from usp.linear_attention.kernels import Traits
from usp.machine import verdicts
from usp.ops import tried

TRAITS = Traits(torch.device("cpu"), torch.bfloat16, (3, 2), "tokens")


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("USP_SELF_CHECK", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tried, "_is_asked_of", lambda device: True)
    monkeypatch.setattr(tried, "_in_own_process", lambda device: False)
    monkeypatch.setattr(families, "FAMILIES", (family,))
    for forget in (tried.forget, verdicts.forget):
        forget()
    yield
    for forget in (tried.forget, verdicts.forget):
        forget()


def shifted(x: Tensor) -> Tensor:
    return x.roll(1, 0)


def raises(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("name", "how", "seen"),
    [
        ("update", shifted, "update is off by .* where .* is allowed .a decay a token."),
        ("dg", shifted, "dg is off by"),
        ("dk", lambda x: x * torch.nan, "dk is off by nan"),
        ("out", raises, "RuntimeError: no kernel image"),
    ],
)
def test_who_is_wrong_is_left_out(
    name: str, how: Any, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(family.SPOILED, name, how)
    with pytest.warns(UserWarning, match=f"linear attention by 'recurrent' is left out.*{seen}"):
        assert families.chosen(TRAITS) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert families.chosen(TRAITS) is None  # said once


def test_a_verdict_is_kept_for_a_dtype_and_dims() -> None:
    assert families.chosen(TRAITS) is family
    for forget in (tried.forget, verdicts.forget):
        forget()
    with mock.patch.object(trust, "_problem", side_effect=AssertionError):
        assert families.chosen(TRAITS) is family
        other = Traits(TRAITS.device, TRAITS.dtype, (3, 5), "tokens")
        with pytest.warns(UserWarning, match="left out"):
            assert families.chosen(other) is None


def test_of_fake_tensors_there_is_nothing_to_read() -> None:
    with FakeTensorMode():
        x = torch.randn(1, 9, 2, 3)
        assert usp.linear_attention(x, x, x).shape == x.shape
