"""``usp tune``: who is fastest here comes first, and who is wrong is not timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import families
import pytest
import torch

from usp import cli
from usp.backends import _local, _timing, forget_order, in_order, reference, select, trust, tune
from usp.machine import cpu
from usp.planning.problem import Traits

backends: Any = importlib.import_module("usp.backends")
CPU = torch.device("cpu")
TRAITS = Traits("cpu", torch.float32, 16, 16, 0.25, architecture="cpu", device=CPU)
SMALL = tuple(
    _timing.Case(torch.float32, 1, n, 4, 16, causal) for n in (33, 9) for causal in (1, 0)
)
SLOW = """
def spoil(out, lse):
    time.sleep({})
    return out, lse
"""
TICK = 0.02  # no less than what one sample takes at least: each is of one call
Families = Callable[..., list[ModuleType]]


class Clock:
    """Time that passes when it is read or slept: a loaded machine changes no order."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += TICK
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def a_new_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Clock) -> Iterator[None]:
    monkeypatch.setenv("USP_SELF_CHECK", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "kind", lambda: "cpu of another maker")
    monkeypatch.setitem(_timing.CASES, "cpu", SMALL)
    monkeypatch.setattr(_timing, "time", clock)
    trust.forget()
    _local.forget()
    yield
    trust.forget()
    _local.forget()


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Clock) -> Families:
    """table(name=changes, ...): the backends there are, beside the reference."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(**changes: str) -> list[ModuleType]:
        made = [families.make(tmp_path, name, text) for name, text in changes.items()]
        for module in made:
            module.time = clock
        monkeypatch.setattr(backends, "TABLE", (*made, reference))
        return made

    return make


def order() -> list[str]:
    return [backend.NAME for backend in in_order("cpu", CPU)]


def test_the_fastest_comes_first_from_then_on(table: Families) -> None:
    table(slow=SLOW.format(0.03), middle=SLOW.format(0.01), fast="")
    assert order() == ["slow", "middle", "fast", "reference"]
    found = tune(CPU, 3.0)
    assert found.row.order == ("fast", "reference", "middle", "slow")
    assert found.row.times[:2] == (1.0, 1.0) and 1 < found.row.times[2] < found.row.times[3]
    assert found.cases == len(SMALL) and not found.left_out
    for _ in range(2):
        assert order() == list(found.row.order)
        assert found.row.order[0] == select("auto", TRAITS).NAME
        _local.forget()  # as a new process
    forget_order(CPU)
    assert order()[0] == "slow"


def test_who_is_wrong_is_not_timed(table: Families) -> None:
    table(wrong=families.WRONG["wrong_dk"][0], right="")
    found = tune(CPU, 1.0)
    assert "wrong" not in found.row.order
    assert found.left_out["wrong"].startswith("it is wrong here: dk of block")


def test_a_verdict_is_found_anew(table: Families, tmp_path: Path) -> None:
    """What was wrong in an older library may be right after it was mended in place."""
    table(mended=families.WRONG["wrong_out"][0])
    with pytest.warns(UserWarning, match="mended"):
        assert select("auto", TRAITS).NAME == "reference"
    backends.TABLE = (families.make(tmp_path, "mended"), reference)
    assert tune(CPU, 1.0).left_out == {}
    _local.drop(CPU, ())
    assert select("auto", TRAITS).NAME == "mended"


def test_who_takes_no_case_or_fails_is_said(table: Families) -> None:
    refuses = "def reasons_against(traits): return ('it takes nothing',)"
    fails = """
    def seen(block):
        if block.q.shape[1] == 33: raise RuntimeError("too long")
        return block
    """
    table(refuses=refuses, fails=fails)
    found = tune(CPU, 1.0)
    assert found.row.order == ("reference",)
    assert found.left_out == {"refuses": "it takes nothing", "fails": "RuntimeError: too long"}


def test_who_is_hopeless_is_measured_no_further(
    table: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_timing, "_HOPELESS", 3.0)
    (slow, _) = table(hopeless=SLOW.format(0.2), fast="")
    calls = []
    forward = slow.attention_partials
    slow.attention_partials = lambda block: calls.append(block) or forward(block)
    found = tune(CPU, 1.0)
    assert found.row.order[-1] == "hopeless" and found.row.times[-1] > 3.0
    timed = [block for block in calls if block.q.shape[1] in (33, 9)]
    assert len(timed) == 2  # one that does not count, and one that does


def test_where_nothing_can_be_kept_it_holds_here(table: Families, tmp_path: Path) -> None:
    table(slow=SLOW.format(0.02), fast="")
    (tmp_path / "cache").write_text("a file where the folder should be")
    found = tune(CPU, 1.0)
    assert "for this process alone" in found.kept and "TRITON_CACHE_DIR" in found.kept
    assert order() == list(found.row.order)


def test_nothing_is_left_to_measure(table: Families, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TABLE", ())
    with pytest.raises(RuntimeError, match="nothing could be measured"):
        tune(CPU, 1.0)


def test_the_command(table: Families, capsys: pytest.CaptureFixture[str]) -> None:
    table(slow=SLOW.format(0.02), wrong=families.WRONG["nan"][0], fast="")
    assert cli.main(["tune", "--device", "cpu", "--seconds", "1"]) == 0
    said = capsys.readouterr().out
    assert "1.00" in said and "not measured\n  wrong  it is wrong here: out is off" in said
    assert str(_local.store()) in said
    assert cli.main(["info"]) == 0
    assert "(measured here by usp tune, 20" in capsys.readouterr().out
    assert cli.main(["tune", "--device", "cpu", "--forget"]) == 0
    capsys.readouterr()
    cli.main(["info"])
    assert "measured here" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "meta"),
        (["--device", "cpu", "--seconds", "0"], "positive, got 0"),
    ],
)
def test_what_cannot_be_tuned(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_families_that_there_are() -> None:
    found = tune(CPU, 1.0)
    here = {backend.NAME for backend in backends.TABLE if not backend.reasons_against(TRAITS)}
    assert set(found.row.order) == here >= {"sdpa", "reference"}
    assert set(found.left_out) == {backend.NAME for backend in backends.TABLE} - here
