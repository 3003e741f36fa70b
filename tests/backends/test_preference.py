""" "auto" prefers what the committed results say, and nothing else does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from places import BENCHMARKS
from torch._subclasses.fake_tensor import FakeTensorMode

import usp
from usp import kernels
from usp.backends import TABLE, _local, in_order, order_of, packages, select
from usp.backends._local import LocalRow
from usp.backends.library import trusted
from usp.backends.preference import GUESSES, PREFERENCES, Preference, measured_on, preference
from usp.bench import preference as decided
from usp.bench.records import Report, read, time_records
from usp.bench.timing import Times
from usp.machine import cpu, place
from usp.planning.problem import Traits

RESULTS = BENCHMARKS / "results"
ZEN_4 = "cpu AMD avx512_bf16"
ON_CPU = Traits("cpu", torch.bfloat16, 64, 64, 0.125, architecture="cpu")


def check(device: str, row: Preference) -> None:
    """A row is what its results say, and they are of its device."""
    reports = [read(RESULTS / name) for name in row.results]
    assert {decided.measured_on(report) for report in reports} == {device}
    assert all(decided.is_measured(report) for report in reports)
    assert row.order == decided.order(reports)
    assert set(row.order) <= {backend.NAME for backend in TABLE}


@pytest.mark.parametrize("device", PREFERENCES)
def test_a_row_is_what_its_results_say(device: str) -> None:
    check(device, PREFERENCES[device])


def test_a_row_that_its_results_do_not_say_is_found() -> None:
    row = PREFERENCES[ZEN_4]
    with pytest.raises(AssertionError):
        check(ZEN_4, replace(row, order=row.order[::-1]))
    for other in ("sm_90", "cpu", "cpu Intel avx512_bf16", "cpu AMD avx2"):
        with pytest.raises(AssertionError):
            check(other, row)
    with pytest.raises(AssertionError):
        check(ZEN_4, replace(row, results=()))


def test_no_result_of_a_gpu_is_left_unheeded() -> None:
    for path in RESULTS.glob("*gpu_attention*.json"):
        device = decided.measured_on(read(path))
        assert path.name in preference(device).results, (
            f"{path.name} decides what auto prefers on {device}: give it a row in "
            f"usp/backends/preference.py (usp bench gpu_attention --report prints it)"
        )


def test_no_kind_of_cpu_is_left_unheeded() -> None:
    """Results of one day replace those of another; but a kind of CPU with results has a row."""
    measured = {decided.measured_on(read(x)) for x in RESULTS.glob("*cpu_attention*.json")}
    assert measured and measured <= set(PREFERENCES), (
        f"give {sorted(measured - set(PREFERENCES))} a row in usp/backends/preference.py"
    )


def a_report(**seconds: float) -> Report:
    """As `gpu_attention` writes it, one case."""
    rounds = {f"usp {name}": [value] * 3 for name, value in seconds.items()}
    return Report({"architecture": "sm_90"}, [{"record": "local", "rounds": rounds}])


def test_the_fastest_of_all_shared_cases_comes_first() -> None:
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
    assert decided.measured_on(reports[0]) == "sm_90"


def test_a_rehearsal_decides_nothing() -> None:
    report = a_report(triton=1.0)
    assert decided.is_measured(report)
    report.header["dry_run"] = True
    assert not decided.is_measured(report)


def test_kernels_on_a_cpu_decide_too() -> None:
    head = {"cpu_vendor": "AMD", "cpu_capability": "avx2"}
    for names in (("usp native", "sdpa"), ("usp native", "usp sdpa", "sdpa", "matmul")):
        times = Times({name: [2.0 - i] * 3 for i, name in enumerate(names[:2])})
        records = [*time_records("backward", {"length": 8}, times)]
        if len(names) > 2:  # torch's bare call is another candidate then
            records += time_records("backward", {"length": 8}, Times({"sdpa": [9.0]}))
        report = Report(head, records)
        assert decided.measured_on(report) == "cpu AMD avx2"
        assert decided.order([report]) == ("sdpa", "native")


def test_what_counts_before_what(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row of this machine, a committed one, libraries in order of trust, ours."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device, rows = torch.device("cpu"), packages()
    assert order("sm_90", device) == [*trusted("sm_90"), *others(trusted("sm_90"))]
    monkeypatch.setitem(PREFERENCES, "sm_90", Preference(("native", "aten_flash")))
    measured = list(dict.fromkeys(["native", "aten_flash", *trusted("sm_90")]))
    assert order("sm_90", device) == [*measured, *others(measured)]
    assert order("sm_80", device)[0] == trusted("sm_80")[0]
    _local.keep(device, rows, LocalRow(("reference", "triton", "gone"), "today", (1.0, 2.0, 3.0)))
    measured = ["reference", "triton", *measured]
    for _ in range(2):
        assert order("sm_90", device) == [*measured, *others(measured)]
        assert "measured here by usp tune, today" in order_of("sm_90", device)[0].why
        _local.forget()  # as a new process
    _local.drop(device, rows)
    assert order("sm_90", device)[0] == "native"
    _local.forget()
    assert order("sm_90", device)[0] == "native"


def order(architecture: str, device: torch.device) -> list[str]:
    return [backend.NAME for backend in in_order(architecture, device)]


def others(names: Sequence[str]) -> list[str]:
    return [backend.NAME for backend in TABLE if backend.NAME not in names]


@pytest.mark.parametrize("what", ["driver", "_software", "name_of", "version_of"])
def test_a_row_of_another_place_does_not_count(
    what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device = torch.device("cpu")
    _local.keep(device, ["numpy"], LocalRow(("reference",), "today", (1.0,)))
    _local.forget()
    monkeypatch.setattr(place, what, lambda *_: "another")
    assert _local.recall(device, ["numpy"]) is None
    _local.forget()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_fake_tensor_of_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _local.keep(torch.device("cpu"), [], LocalRow(("reference",), "today", (1.0,)))
    assert _local.recall(torch.device("cuda", 0), []) is None
    with FakeTensorMode():
        q = torch.empty(1, 5, 2, 8, device="cuda")
        assert usp.long_context_attention(q, q, q, causal=True).shape == q.shape
    _local.forget()


@pytest.mark.parametrize("text", ["{", '{"order": 3}', '{"order": [], "date": "", "times": ["x"]}'])
def test_a_row_that_is_none_is_no_error(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _local.forget()
    device = torch.device("cpu")
    row = text if text == "{" else f'{{"{place.place(device, [])}": {text}}}'
    _local.store().write_text(row)
    assert _local.recall(device, []) is None
    _local.forget()


@pytest.fixture
def zen_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tests ran on the CPU that was measured."""
    monkeypatch.setattr(cpu, "kind", lambda: ZEN_4)


def test_auto_asks_in_the_order_of_the_device(monkeypatch: pytest.MonkeyPatch, zen_4: None) -> None:
    names = [backend.NAME for backend in TABLE]
    assert [backend.NAME for backend in in_order("not measured")] == names
    assert sorted(backend.NAME for backend in in_order("cpu")) == sorted(names)
    assert select("auto", ON_CPU).NAME == "native"
    monkeypatch.setitem(PREFERENCES, ZEN_4, Preference(("reference", "native")))
    assert [backend.NAME for backend in in_order("cpu")][:2] == ["reference", "native"]
    assert select("auto", ON_CPU).NAME == "reference"
    assert select("native", ON_CPU).NAME == "native"


def test_a_cpu_that_no_result_is_of_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for vendor, level in (("Intel", "avx512_bf16"), ("AMD", "avx2"), ("AMD", "amx")):
        monkeypatch.setattr(cpu, "vendor", lambda vendor=vendor: vendor)
        monkeypatch.setattr(cpu, "level", lambda level=level: level)
        assert measured_on("cpu") == f"cpu {vendor} {level}"
        assert not preference("cpu").results
        assert [backend.NAME for backend in in_order("cpu")][:2] == list(GUESSES["cpu"])
    monkeypatch.setattr(cpu, "level", lambda: "avx512_bf16")
    assert preference("cpu").order == ("native", "sdpa")


def test_who_made_a_cpu() -> None:
    names = {
        "AMD EPYC / 25 / 17": "AMD",
        "AuthenticAMD": "AMD",
        "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD": "AMD",
        "Intel(R) Xeon(R) Platinum 8480+ / 6 / 143": "Intel",
        "GenuineIntel": "Intel",
        "Intel64 Family 6 Model 143 Stepping 8, GenuineIntel": "Intel",
        "arm": "arm",
        "": "unknown",
    }
    assert {name: cpu.vendor_of(name) for name in names} == names
    assert cpu.vendor() == cpu.vendor_of(cpu.model())


def test_the_level_of_a_cpu_is_the_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USP_CPU_CAPABILITY", "default")
    assert cpu.level() in ("default", "none")
    assert cpu.kind() == f"cpu {cpu.vendor()} {cpu.level()}"


def test_the_architecture_of_a_device() -> None:
    assert kernels.architecture(torch.device("cpu")) == "cpu"
    if not torch.cuda.is_available():
        assert kernels.architecture(torch.device("cuda", 0)) == "cuda"
