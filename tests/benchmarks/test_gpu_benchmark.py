"""The GPU benchmark without a GPU: what it computes is right, and what is wrong is not timed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from programs import BENCHMARKS, module, program

from usp.backends import native
from usp.bench import libraries
from usp.bench.attention import Own, Problem
from usp.bench.steps import HeadExchange
from usp.testing import dense_attention

pytestmark = pytest.mark.device_code
needs_kernels = pytest.mark.skipif(
    native.unavailable() is not None, reason="the compiled extension was not built"
)
MASKS = ("causal", "full", "gqa", "window", "documents")


def small(mask: str, dtype: str = "fp16") -> Any:
    width = 128 if mask == "gqa" else 32
    return module("gpu.case").local_case(dtype, 16, 48, mask, 96, width, window=11)


def problem(mask: str) -> Any:
    case = small(mask)
    return Problem(case, "cpu", module("gpu.case").own(case.dtype, 16, "cpu"), {})


@pytest.mark.parametrize("mask", MASKS)
def test_its_fp64_is_the_oracles(mask: str) -> None:
    made = problem(mask)
    case, group = made.case, made.case.heads // made.case.kv_heads
    leaves = [x.detach()[-1:].double().requires_grad_() for x in made.leaves]
    out, _ = dense_attention(*leaves, **case.options)
    grads = torch.autograd.grad(out, leaves, made.dout[-1:].double())
    assert out.shape[2] == case.heads and case.shape[0] == 2
    for name, x in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True):
        heads = slice(-group, None) if name in ("out", "dq") else -1
        torch.testing.assert_close(made.exact[name], x.detach()[0, :, heads], rtol=0, atol=1e-12)


@needs_kernels
@pytest.mark.parametrize("which", ["forward", "both"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rings_of_virtual_ranks_are_exact(ranks: int, which: str) -> None:
    sizes, everyone = module("gpu.sizes").sizes_for("cpu"), range(ranks)
    ring = module("gpu.ring").VirtualRing(ranks, sizes.randn("cpu", 4, 1, 20 * ranks, 3, 16))
    exact = ring.exact()
    runs = [ring.usp(Own(native), which, everyone)]
    for merge in libraries.MERGES.values():
        runs.append(ring.library(libraries.CPU, merge, which, everyone))
    for run in runs:
        for _ in range(2):  # sums start anew
            errors = ring.errors(run(), exact)
            assert set(errors) == ({"out"} if which == "forward" else {"out", "dq", "dk", "dv"})
            assert max(errors.values()) < 2e-3


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_virtual_head_exchange_is_one(degree: int) -> None:
    tensors = torch.randn(3, 1, 5, 6, 4)
    made = HeadExchange(degree, *tensors)
    for which in ("scatter", "gather"):
        for name, run in made.runs(which).items():
            for found, expected in zip(run(), made.expected(which), strict=True):
                assert torch.equal(found, expected), (which, name)


def never(name: str, reason: str) -> NoReturn:
    raise AssertionError(f"{name}: {reason}")


def settings(**avoid: str) -> Any:
    guard = module("gpu.guard").Guard(avoid, never)
    return module("gpu.measure").Settings("cpu", 3, 0.01, at_least=0.0, guard=guard)


@needs_kernels
def test_every_case_is_measured_and_said() -> None:
    pytest.importorskip("triton")
    goals, families = module("gpu.goals"), module("gpu.families")
    report = {"records": {n: [] for n in ("local", "ring_steps", "rings", "exchange")}}
    report |= {"auto": "usp native", "runs": [{"dry_run": True}]}
    for item in families.items(settings()):
        records = item.measure()
        for record in records:
            assert "usp native" in record["seconds"], record["not_timed"]
            assert not record["wrong"]
            assert all(len(taken) == 3 for taken in record["rounds"].values())
            module("gpu_attention").line({"key": item.key, **record})
        report["records"][item.family] += records
    assert all(report["records"].values())
    assert {row["verdict"] for row in goals.table(report)} <= {"met", "missed", "not measured"}
    assert "usp native" in goals.text(report)


@needs_kernels
def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Problem._usp

    def off(self: Any, contestant: Any) -> Any:
        attend = right(self, contestant)
        return lambda q, k, v: attend(q, k, v) + 0.1

    monkeypatch.setattr(Problem, "_usp", off)
    for record in module("gpu.families").local(small("causal"), settings()):
        assert "usp native" in record["wrong"] and "out is off by" in record["wrong"]["usp native"]
        assert list(record["seconds"]) == ["sdpa"]
    said = {"records": {"local": [{"key": "one", "wrong": {"usp native": "off"}}]}}
    assert module("gpu_attention").said_of_wrong({**said, "avoid": {}, "failed": {}}) == 1


def test_who_faults_or_hangs_is_left_out() -> None:
    guard, dead = module("gpu.guard"), []

    def fatal(name: str, reason: str) -> None:
        dead.append((name, reason))

    found, failed = guard.Guard({"old": "it was fatal"}, fatal, 0.05).tried(
        {
            "fine": lambda: 1,
            "refuses": lambda: [][1],
            "hangs": lambda: time.sleep(0.3),
            "old": lambda: never("old", "was called"),
        }
    )
    assert found["fine"] == 1 and set(found) == {"fine", "hangs"}
    assert failed == {"refuses": "IndexError: list index out of range", "old": "it was fatal"}
    assert dead == [("hangs", "it hangs")]


USP = ("usp triton", "usp native", "usp hopper")
NAMES = (*USP, "sdpa flash", "sdpa cudnn", "flex")


def record(family: str, seconds: dict[str, float], **more: Any) -> dict[str, Any]:
    rounds = {name: [s, s * 1.01, s * 0.99] for name, s in seconds.items()}
    about = {"key": f"a {family}", "run": 0, "clock": "graph", "wrong": {}, "not_timed": {}}
    return {**about, "seconds": seconds, "rounds": rounds, **more}


def made_up(usp: float) -> dict[str, Any]:
    """A report as a GPU would give it: all rivals take 1 second, usp as long as is said."""
    local, steps, rings, exchange = [], [], [], []
    seconds = {name: usp if name.startswith("usp") else 1.0 for name in NAMES}
    errors = {name: {"out": 2e-3 * s, "dk": 3e-3 * s} for name, s in seconds.items()}
    shape = {"dtype": "bf16", "head_dim": 128, "length": 8192, "errors": errors}
    for mask in ("causal", "full", "window"):
        for which in ("forward", "backward"):
            more = {"mask": mask, "pass": which, "usp": list(USP), "tflops": seconds}
            local.append(record("local", dict(seconds), **shape, **more))
    for length in (1024, 2048, 4096, 8192):
        names = (
            "usp native",
            "usp native, no state",
            "flash + Python merge",
            "cudnn + fused merge",
        )
        found = dict(zip(names, (usp, 1.0, 1.0, 1.0), strict=True))
        steps.append(record("step", found, length=length))
    for ranks in (2, 4):
        found = {"usp native": usp, "flash + Python merge": 1.0}
        peaks = {name: int(2**20 * s * (1 + usp * ranks / 100)) for name, s in found.items()}
        more = {"efficiency": {"usp native": 0.5 / usp}, "memory": {"usp native": usp}}
        more |= {"peak_bytes": peaks, "ranks": ranks, "pass": "both"}
        rings.append(record("ring", found, **more))
    share = {"of_copy": {"usp native": 0.5 / usp, "torch": 0.3}, "degree": 2, "pass": "scatter"}
    exchange.append(record("exchange", {"usp native": usp}, **share))
    families = {"local": local, "ring_steps": steps, "rings": rings, "exchange": exchange}
    about = {"matrix_tflops": {"bf16": 2.0}, "copy_bytes_per_second": 1.0}
    about |= {"architecture": "sm_90", "dry_run": False}
    more = {"runs": [about], "done": [], "left_out": [], "failed": {}, "avoid": {}}
    return {"auto": "usp triton", "records": families, **more}


@pytest.mark.parametrize(("usp", "verdict"), [(0.25, "met"), (4.0, "missed")])
def test_goals_say_met_or_missed(usp: float, verdict: str) -> None:
    rows = module("gpu.goals").table(made_up(usp))
    assert {row["verdict"] for row in rows} == {verdict}
    forward = next(row for row in rows if row["goal"] == "forward over flash")
    assert forward["who"] == "usp triton" and forward["cases"] == 2
    assert forward["worst"] == pytest.approx(1 / usp)


def test_the_worst_case_counts_and_the_fastest_is_preferred() -> None:
    goals, report = module("gpu.goals"), made_up(0.25)
    slow = report["records"]["local"][2]
    assert (slow["mask"], slow["pass"]) == ("full", "forward")
    slow["seconds"]["usp triton"], slow["rounds"]["usp triton"] = 2.0, [2.0] * 3
    rows = goals.table(report)
    missed = [row for row in rows if row["verdict"] == "missed"]
    assert [(row["goal"], row["who"], row["where"]) for row in missed] == [
        ("forward over flash", "usp triton", "full 8192")
    ]
    (row,) = goals.preferred(report)
    assert row["fastest"] == "usp native" and row["over"]["usp triton"] == pytest.approx(
        8 ** (1 / 6)
    )
    text = goals.text(report)
    assert '"auto" takes usp triton on this device' in text and "missed" in text
    assert "\"sm_90\": Preference(('native', 'triton')" in text


def test_plots_and_tables_come_from_the_file_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "made_up.json"
    module("gpu.report").write(made_up(0.25), file)
    done = program("gpu_attention", "--report", "--json", str(file))
    assert done.returncode == 0, done.stderr
    drawn = {path.stem.removeprefix("made_up-") for path in tmp_path.glob("*.png")}
    assert {"local-causal-bf16-128-forward", "ring-step", "ring-efficiency-both"} < drawn
    assert {"ring-memory-both", "exchange-scatter"} < drawn and len(drawn) == 6 + 4
    assert module("gpu.report").load(file)["goals"][0]["verdict"] == "met"


def test_a_dry_run_and_what_goes_on_with_it(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "dry.json"
    dry = ["--dry-run", "--json", str(file)]
    done = program("gpu_attention", *dry, "--only", "exchange 2")
    assert done.returncode == 0, done.stderr
    assert "usp triton" in module("gpu.report").load(file)["records"]["exchange"][0]["of_copy"]
    done = program("gpu_attention", *dry, "--only", "exchange", "--budget", "0")
    assert "going on with" in done.stdout and "no time was left for 2 cases" in done.stdout
    report = module("gpu.report").load(file)
    assert report["left_out"] == ["exchange 3 scatter", "exchange 3 gather"]
    assert report["done"] == ["exchange 2 scatter", "exchange 2 gather"]
    assert len(report["runs"]) == 2 and report["runs"][1]["dry_run"]
    assert {"date", "commit", "torch", "triton"} <= report["runs"][1].keys()


def test_nothing_is_measured_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    file = tmp_path / "none.json"
    done = program("gpu_attention", "--json", str(file))
    assert done.returncode == 1 and "nothing to measure: " in done.stderr
    inside = BENCHMARKS / "results" / "dry.json"
    done = program("gpu_attention", "--dry-run", "--json", str(inside))
    assert done.returncode == 2 and "may not lie among the results" in done.stderr
    assert not file.exists() and not inside.exists()
