""" "auto" prefers what the committed results say, and nothing else does."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from places import BENCHMARKS

from usp import kernels
from usp.backends import TABLE, in_order, preference, select
from usp.backends.preference import PREFERENCES, Preference
from usp.planning.problem import Traits

RESULTS = BENCHMARKS / "results"
ON_CPU = Traits("cpu", torch.bfloat16, 64, 64, 0.125, architecture="cpu")


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the results of a benchmark decide."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield import_module("_preference")
    sys.modules.pop("_preference")


def read(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return report


def check(decided: Any, architecture: str, row: Preference) -> None:
    """A row is what its results say, and they are of its device."""
    reports = [read(name) for name in row.results]
    assert {decided.architecture(report) for report in reports} == {architecture}
    assert all(decided.is_measured(report) for report in reports)
    assert row.order == decided.order(reports)
    assert set(row.order) <= {backend.NAME for backend in TABLE}


@pytest.mark.parametrize("architecture", PREFERENCES)
def test_a_row_is_what_its_results_say(decided: Any, architecture: str) -> None:
    check(decided, architecture, PREFERENCES[architecture])


def test_a_row_that_its_results_do_not_say_is_found(decided: Any) -> None:
    row = PREFERENCES["cpu"]
    with pytest.raises(AssertionError):
        check(decided, "cpu", replace(row, order=row.order[::-1]))
    with pytest.raises(AssertionError):
        check(decided, "sm_90", row)
    with pytest.raises(AssertionError):
        check(decided, "cpu", replace(row, results=()))


def test_no_result_of_a_gpu_is_left_unheeded(decided: Any) -> None:
    for path in RESULTS.glob("*gpu_attention*.json"):
        architecture = decided.architecture(read(path.name))
        assert path.name in preference(architecture).results, (
            f"{path.name} decides what auto prefers on {architecture}: give it a row in "
            f"usp/backends/preference.py (usp bench gpu_attention --report prints it)"
        )


def a_report(**seconds: float) -> dict[str, Any]:
    """As `gpu_attention` writes it, one case."""
    rounds = {f"usp {name}": [value] * 3 for name, value in seconds.items()}
    run = {"architecture": "sm_90", "dry_run": False}
    return {"runs": [run], "records": {"local": [{"rounds": rounds, "seconds": {}}]}}


def test_the_fastest_of_all_shared_cases_comes_first(decided: Any) -> None:
    reports = [
        a_report(triton=1.0, native=2.0, hopper=0.1),  # hopper is triton's, another way
        a_report(triton=4.0, native=1.0),
        a_report(triton=1.0, native=1.0),
        a_report(triton=0.001),  # not shared
    ]
    assert decided.order(reports) == ("native", "triton")
    assert decided.means(reports) == pytest.approx({"native": 1.0, "triton": 2 ** (1 / 3)})
    assert decided.order([a_report(triton=1.0)]) == ("triton",)
    assert decided.order([]) == ()
    assert decided.architecture(reports[0]) == "sm_90"


def test_a_rehearsal_decides_nothing(decided: Any) -> None:
    report = a_report(triton=1.0)
    assert decided.is_measured(report)
    report["runs"].append({"architecture": "cpu", "dry_run": True})
    assert not decided.is_measured(report)


def test_auto_asks_in_the_order_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [backend.NAME for backend in TABLE]
    assert [backend.NAME for backend in in_order("not measured")] == names
    assert sorted(backend.NAME for backend in in_order("cpu")) == sorted(names)
    assert select("auto", ON_CPU).NAME == "native"
    monkeypatch.setitem(PREFERENCES, "cpu", Preference(("reference", "native")))
    assert [backend.NAME for backend in in_order("cpu")][:2] == ["reference", "native"]
    assert select("auto", ON_CPU).NAME == "reference"
    assert select("native", ON_CPU).NAME == "native"


def test_the_architecture_of_a_device() -> None:
    assert kernels.architecture(torch.device("cpu")) == "cpu"
    if not torch.cuda.is_available():
        assert kernels.architecture(torch.device("cuda", 0)) == "cuda"
