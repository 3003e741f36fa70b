"""Kernels are tried before they are used, and timed by ``usp tune``: what only a GPU can show."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from gpu_checks import Subject, subject

from usp.backends import (
    _local,
    _self_check,
    _timing,
    native,
    reference,
    select,
    triton,
    trust,
    tune,
)
from usp.kernels import architecture
from usp.machine import verdicts
from usp.ops import merge, pack, tried
from usp.planning.problem import Traits

__all__ = ["subject"]  # the fixture
pytestmark = pytest.mark.gpu
backends: Any = importlib.import_module("usp.backends")


@pytest.fixture
def a_new_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str) -> Iterator[None]:
    """Nothing is known of it; in a rehearsal a CPU is taken for a GPU."""
    monkeypatch.setenv("USP_SELF_CHECK", "1")
    monkeypatch.setattr(verdicts.kept, "folder", lambda: tmp_path)
    if device == "cpu":
        monkeypatch.setattr(trust, "in_own_process", lambda traits: True)
        monkeypatch.setattr(trust, "interpreted", lambda: False)
        monkeypatch.setattr(backends, "interpreted", lambda: False)
        monkeypatch.setattr(tried, "_is_asked_of", lambda device: True)
        monkeypatch.setattr(tried, "_in_own_process", lambda device: True)
    forgets = trust.forget, _local.forget, tried.forget
    for forget in forgets:
        forget()
    yield
    for forget in forgets:
        forget()


def here(device: str) -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if device == "cuda"
        else torch.device(device)
    )


def traits(device: str, **options: Any) -> Traits:
    place = here(device)
    of = {"architecture": architecture(place), "device": place}
    return Traits(place.type, torch.bfloat16, 64, 64, 0.125, **of, **options)


@pytest.mark.parametrize("options", [{"bias": True}, {"alibi": True, "dropout": True}, {}], ids=str)
def test_the_check_finds_kernels_right(
    options: dict[str, bool], subject: Subject, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the interpreter is slow
    monkeypatch.setattr(_self_check, "ON_CPU", _self_check.Sizes(1, 19, 5, 23))
    module = native if subject.name == "native" else triton
    with subject.setting():
        found = _self_check.wrong_with(module, traits(device, **options), here(device))
    assert found is None


def test_those_that_merge_and_pack_are_right(device: str, a_new_machine: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in merge.MERGERS:
            assert tried.may_run("merging", name, merge.check, here(device))
            assert tried.may_run("packing", name, pack.check, here(device))


def test_auto_leaves_nobody_out(device: str, a_new_machine: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = select("auto", traits(device))
    assert found.NAME != "reference"
    assert None in verdicts.kept_of(here(device)).values()


def test_a_fault_costs_this_process_nothing(
    device: str, a_new_machine: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faults = """
    def seen(block):
        far = torch.tensor([1 << 40], device=block.q.device)
        block.q.flatten()[far].sum().item()
        return block
    """
    monkeypatch.syspath_prepend(tmp_path)
    made = families.make(tmp_path, "faults", faults)
    monkeypatch.setattr(backends, "TABLE", (made, reference))
    with pytest.warns(UserWarning, match="'faults' is left out here: .*'reference' runs instead"):
        assert select("auto", traits(device)).NAME == "reference"
    assert torch.ones(3, device=device).sum().item() == 3


def test_the_fastest_comes_first(
    device: str, a_new_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":  # another process has an interpreter that multiplies bf16 wrongly
        monkeypatch.setattr(backends, "TABLE", tuple(b for b in backends.TABLE if b is not triton))
    length = 1024 if device == "cuda" else 17
    cases = tuple(
        _timing.Case(torch.bfloat16, 1, length, 4, 64, causal) for causal in (True, False)
    )
    monkeypatch.setitem(_timing.CASES, here(device).type, cases)
    found = tune(here(device), 2.0)
    print(found)
    assert not any("wrong" in reason for reason in found.left_out.values())
    monkeypatch.setenv("USP_SELF_CHECK", "0")
    assert found.row.order[0] == select("auto", traits(device)).NAME
