"""The measuring core: turns, quantiles, judging, records, what a machine can do at most."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from usp.bench import machine, show
from usp.bench.case import GRIDS, Case, grid
from usp.bench.device import Roof, Settings, measured
from usp.bench.exact import WrongResult, exact_heads, refuse_inexact, relative_error, wrong
from usp.bench.options import parse, parser
from usp.bench.records import Sink, Unreadable, not_timed, read, time_records
from usp.bench.timing import Times, quantile, take_turns
from usp.testing import dense_attention

SETTINGS = Settings("cpu", 3, 0.0, at_least=0.0)


def test_turns_are_taken_in_both_orders_and_paired_by_round() -> None:
    order: list[str] = []
    seconds = iter([1.0, 2.0, 4.0, 1.0, 3.0, 3.0])
    times = take_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        rounds=3,
        budget=1e9,
        seconds=lambda run: (run(), next(seconds))[1],
    )
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"  # the first two do not count
    assert times.seconds == {"a": [1.0, 1.0, 3.0], "b": [2.0, 4.0, 3.0]}
    assert times.ratio("b", "a") == 2.0
    assert times.median("b") == 3.0


def test_quantiles_are_numpys() -> None:
    values = torch.randn(7, generator=torch.Generator().manual_seed(1)).double()
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert quantile(values.tolist(), share) == pytest.approx(values.quantile(share).item())


def test_short_calls_are_repeated_and_told_by_the_call() -> None:
    calls = []
    times, clock = measured({"a": lambda: calls.append(1)}, Settings("cpu", 3, 0.0, at_least=1e-4))
    assert len(calls) > 20 and clock == "wall"
    assert 0 < times.median("a") < 1e-4


@pytest.mark.parametrize("mask", ["full", "causal", "window", "documents"])
def test_fp64_of_a_case_is_the_oracles(mask: str) -> None:
    case = Case("fp32", 1, 48, 2, 1, 8, mask, window=11)
    tensors = torch.randn(4, 1, case.length, 2, 8, dtype=torch.float64)
    q, dout = tensors[0], tensors[1]
    k, v = tensors[2, :, :, :1], tensors[3, :, :, :1]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, _ = dense_attention(*leaves, **case.options)
    wanted = [out, *torch.autograd.grad(out, leaves, dout)]
    found = exact_heads(
        (q[0], k[0, :, 0], v[0, :, 0], dout[0]), case.interval("cpu"), case.head_dim**-0.5
    )
    for x, exact in zip(wanted, found.values(), strict=True):
        torch.testing.assert_close(x.detach()[0].squeeze(1).view_as(exact), exact)
    visible = case.dense("cpu")
    seen = case.length**2 if visible is None else int(visible.sum())
    diagonal = 0 if mask in ("full", "window") else case.length / 2
    assert case.pairs == pytest.approx(seen - diagonal)


def test_who_is_wrong() -> None:
    right = {"out": 1e-7, "dq": 2e-7}
    errors = {"a": right, "b": {"out": 1e-7, "dq": 1e-3}, "c": {"out": float("nan")}}
    assert set(wrong(errors, torch.float32)) == {"b", "c"}
    assert set(wrong(errors, torch.float32, "forward")) == {"c"}
    # all alike, and all beyond rounding
    assert set(wrong({"a": {"out": 1e-2}, "b": {"out": 1e-2}}, torch.float32)) == {"a", "b"}
    with pytest.raises(WrongResult, match=r"dk of x is off by 1.00e-03, more than 1e-05"):
        refuse_inexact("case", {"x": {"out": 1e-7, "dk": 1e-3}}, 1e-5)
    one, nothing = torch.full((4,), 1e-7), torch.full((4,), 1e-17, dtype=torch.float64)
    assert relative_error(one, nothing) == pytest.approx(1e-7)  # gradients that are 0


def test_errors_are_judged_by_the_best_and_by_rounding() -> None:
    dtype = torch.bfloat16
    fine = {"out": 2e-3, "dq": 3e-3}
    assert wrong({"a": fine, "b": {"out": 5.9e-3, "dq": 3e-3}}, dtype) == {}
    assert "out is off by 6.10e-03" in wrong({"a": fine, "b": {"out": 6.1e-3}}, dtype)["b"]
    assert set(wrong({"a": fine, "b": {"out": 2e-3, "dq": float("nan")}}, dtype)) == {"b"}
    assert wrong({"a": {"out": 1e-7}, "b": {"out": 3.8e-3}}, dtype) == {}  # a result in 16 bits
    assert set(wrong({"a": {"out": 0.05}, "b": {"out": 0.05}}, dtype)) == {"a", "b"}


def test_a_case_is_cut_to_a_budget_by_samples_then_heads() -> None:
    case = Case("bf16", 4, 2048, 32, 8, 128, "causal")
    cut = case.within(case.flops("backward") / 20)
    assert cut is not None and (cut.batch, cut.heads, cut.kv_heads) == (1, 4, 1)
    assert case.within(1.0) is None
    for name in GRIDS:
        cases = list(grid(name, ["fp32", "bf16"]))
        assert len(set(cases)) == len(cases) == 2 * len(GRIDS[name])
        assert all(each.heads % each.kv_heads == 0 for each in cases)


def test_what_a_machine_does_at_most() -> None:
    found = Roof(SETTINGS, small=True).record(["fp32", "bf16"])
    assert found["record"] == "roofline" and set(found["flops_per_s"]) == {"fp32", "bf16"}
    assert min(*found["flops_per_s"].values(), found["bytes_per_s"]) > 1e6


def some_records() -> list[dict[str, Any]]:
    times = Times({"usp native": [1.0, 2.0, 3.0], "sdpa": [2.0, 4.0, 6.0]})
    return [
        *time_records("forward", {"length": 8}, times, more={"sdpa": {"errors": {"out": 1e-7}}}),
        *not_timed("forward", {"length": 8}, {"usp x": "it is wrong"}, ["usp x"]),
    ]


def test_records_are_one_a_line_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    head = machine.header("kernels", "cpu", {"rounds": 3, "path": Path("x")}, "wall")
    assert head["arguments"] == {"rounds": 3} and head["format"] == 1
    sink = Sink(file, head)
    for record in some_records():
        sink.add(record)
        assert json.loads(file.read_text().splitlines()[-1])["candidate"] == record["candidate"]
    sink.close()
    report = read(file)
    assert report.header["program"] == "kernels" and report.header["cpu"] == head["cpu"]
    assert [r["median"] for r in report.of("time")] == [2.0, 4.0]
    assert report.of("not_timed")[0]["wrong"] is True
    lines = [show.row(record) for record in report.records]
    assert "2 s" in lines[0] and "off by 1.0e-07" in lines[1]
    assert "WRONG: it is wrong" in lines[2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not one JSON record a line"),
        ('{"environment": 1}\n', "no header is its first line"),
        ('{"record": "time"}\n', "begins with a 'time'"),
        ("", "holds no results"),
    ],
)
def test_what_holds_no_results_is_said(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(Unreadable, match=said):
        read(tmp_path / "a.json")
    with pytest.raises(Unreadable, match="cannot be read"):
        read(tmp_path / "b.json")


def test_quick_gives_way_to_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    made = parser("x", None)
    made.add_argument("--length", type=int, default=9)
    assert parse(made, ["--quick"], length=2).length == 2
    args = parse(made, ["--quick", "--length", "5", "--json"], length=2)
    assert (args.length, args.rounds, args.json) == (5, 3, "-")
    for argv, said in (
        (["--rounds", "2"], "--rounds must be 3 or more, got 2"),
        (["--seconds", "nan"], "--seconds must be 0 or more, got nan"),
        (["--threads", "0"], "argument --threads: must be 1 or more, got 0"),
    ):
        with pytest.raises(SystemExit) as end:
            parse(made, argv)
        assert end.value.code == 2 and said in capsys.readouterr().err


KEEPS = """
import resource, torch
from usp.bench.machine import keep_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def results():
    return [torch.ones(1 << 22) for _ in range(4)]
kept, taken = keep_freed_memory(), []
for _ in range(20):  # until the heap has grown
    before = faults()
    results()
    taken = [*taken, faults() - before]
print(kept, sum(taken[10:]))
"""


def test_freed_memory_that_is_kept_costs_no_fresh_pages(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("counts the page faults of Linux")
    done = subprocess.run(
        [sys.executable, "-c", KEEPS], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    assert kept == str(platform.libc_ver()[0] == "glibc")
    pages = 10 * 4 * (4 << 22) // resource.getpagesize()
    assert kept == "False" or int(faults) < pages / 10, (faults, pages)
