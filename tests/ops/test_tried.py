"""Kernels that move and merge are tried before a GPU uses them; here a CPU plays the GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from usp.machine import verdicts
from usp.ops import merge, native, pack, tried
from usp.ops.merge import MERGERS, Merger, merge_into
from usp.ops.pack import PACKERS, Packer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("USP_SELF_CHECK", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tried, "_is_asked_of", lambda device: True)
    monkeypatch.setattr(tried, "_in_own_process", lambda device: False)
    for forget in (tried.forget, verdicts.forget):
        forget()
    yield
    for forget in (tried.forget, verdicts.forget):
        forget()


def put_first(monkeypatch: pytest.MonkeyPatch, module: Any, way: Any) -> None:
    """Of those that merge or pack, one more that is asked first."""
    name = "MERGERS" if module is merge else "PACKERS"
    monkeypatch.setattr(module, name, {"new": way, **getattr(module, name)})


def a_merge() -> list[Tensor]:
    return [
        torch.zeros(1, 4, 2, 8),
        torch.zeros(1, 2, 4),
        torch.ones(1, 4, 2, 8),
        torch.zeros(1, 2, 4),
    ]


def right_merge(*state: Tensor) -> None:
    MERGERS["torch"].merge_into(*state)


def wrong_out(*state: Tensor) -> None:
    right_merge(*state)
    state[0].mul_(1.01)


def wrong_lse(*state: Tensor) -> None:
    right_merge(*state)
    state[1].add_(0.01)


def nan_of_rows_that_saw_nothing(*state: Tensor) -> None:
    right_merge(*state)
    state[0].masked_fill_((state[1] == -torch.inf).transpose(1, 2)[..., None], torch.nan)


def raises(*_: Any) -> None:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("way", "seen"),
    [
        (wrong_out, "out is wrong"),
        (wrong_lse, "lse is wrong"),
        (nan_of_rows_that_saw_nothing, "out is wrong"),
        (raises, "no kernel image"),
    ],
)
def test_a_wrong_merger_is_left_out(way: Any, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_first(monkeypatch, merge, Merger(lambda *_: True, way))
    for _ in range(2):  # in a second process, too
        with pytest.warns(UserWarning, match=rf"merging by 'new' is left out here: .*{seen}"):
            state = a_merge()
            merge_into(*state)
        assert torch.equal(state[0], torch.full_like(state[0], 0.5))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merge_into(*a_merge())
        tried.forget()
        verdicts.forget()


def skips_rows(tensors: Any, message: Tensor) -> None:
    PACKERS["torch"].pack(tensors, message)
    message[-3:] = 0


def spoils(message: Tensor, tensors: Any) -> None:
    PACKERS["torch"].unpack(message, tensors)
    tensors[-1].zero_()


@pytest.mark.parametrize(
    ("there", "back", "seen"),
    [
        (skips_rows, PACKERS["torch"].unpack, "a message of"),
        (PACKERS["torch"].pack, spoils, "what comes out"),
        (raises, raises, "no kernel image"),
    ],
)
def test_a_wrong_packer_is_left_out(
    there: Any, back: Any, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_first(monkeypatch, pack, Packer(lambda *_: True, there, back))
    x = torch.arange(24.0).view(1, 3, 2, 4)
    with pytest.warns(UserWarning, match=rf"packing by 'new' is left out here: .*{seen}"):
        message = pack.pack([x, x + 1])
    found = [torch.zeros_like(x), torch.zeros_like(x)]
    pack.unpack(message, found)
    assert torch.equal(found[0], x) and torch.equal(found[1], x + 1)


def test_a_right_one_is_used_and_nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(*state: Tensor) -> None:
        calls.append("here")
        right_merge(*state)

    put_first(monkeypatch, merge, Merger(lambda *_: True, counted))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_into(*a_merge())
        checked = len(calls)
        merge_into(*a_merge())
    assert checked > 1 and len(calls) == checked + 1


@pytest.mark.parametrize("name", [name for name in MERGERS if name != "triton"])
def test_those_that_there_are_are_right(name: str) -> None:
    if name == "native" and native.load_error() is not None:
        pytest.skip(f"compiled ops: {native.load_error()}")
    assert merge.check([name, "cpu"]) is None
    assert pack.check([name, "cpu"]) is None


@pytest.mark.long
def test_another_process_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tried, "_in_own_process", lambda device: True)
    assert tried.may_run("merging", "torch", merge.check, CPU)
    assert tried.may_run("packing", "torch", pack.check, CPU)
    assert verdicts.store().read_text().count('"wrong": null') == 2


def test_nothing_is_tried_where_that_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(told: Any) -> str:
        return "it was asked"

    monkeypatch.setenv("USP_SELF_CHECK", "0")
    assert tried.may_run("merging", "new", fails, CPU)
    monkeypatch.setenv("USP_SELF_CHECK", "1")
    with FakeTensorMode():
        assert tried.may_run("merging", "new", fails, CPU)
    with pytest.warns(UserWarning, match="it was asked"):
        assert not tried.may_run("merging", "new", fails, CPU)
    monkeypatch.undo()
    assert tried.may_run("merging", "another", fails, CPU)  # on a CPU
