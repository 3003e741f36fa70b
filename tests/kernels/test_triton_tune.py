"""Tuning: the fastest stays in use, also in a later process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from triton_interpreter import searched

from usp import kernels
from usp.kernels import configs, tune, tuned
from usp.kernels.hopper_configs import HOPPER, Pipeline
from usp.kernels.tune import trials

triton = pytest.importorskip("triton")
DEVICE = torch.device("cpu")  # stands in: only its name and family are asked


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(configs, "family", lambda device: "sm_90")
    monkeypatch.setattr(configs, "device_name", lambda device: "some GPU")
    monkeypatch.setattr(tuned, "store", lambda: tmp_path / "cache" / "tuned.json")
    configs.forget()
    yield
    configs.forget()


def wanted(kernel: str, head_dim: int) -> Iterator[configs.AnyConfig]:
    return configs.wanted(kernel, head_dim, torch.empty(0, dtype=torch.bfloat16))


def launch(head_dim: int) -> dict[str, object]:
    """Of the portable kernel."""
    found = wanted("forward", head_dim)
    return next(config.launch() for config in found if isinstance(config, configs.Config))


def test_the_fastest_is_used_and_remembered(a_gpu: None) -> None:
    candidates = configs.candidates("forward", 128, DEVICE)
    assert launch(128) == candidates[0].launch()
    tried = []

    def seconds() -> float:
        tried.append(launch(128))
        if len(tried) == 1:
            raise RuntimeError("out of resource")
        return {2: 3.0, 3: 1.0}[len(tried)]

    portable = tuple(c for c in candidates if isinstance(c, configs.Config))
    best = tune.fastest("forward", portable, seconds, lambda: True)
    assert tried == [config.launch() for config in portable]
    assert best == candidates[2]
    tuned.remember("some GPU", {("forward", 128): asdict(best)})
    configs.forget()  # as a new process would
    assert launch(96) == candidates[2].launch()
    assert launch(64) == configs.candidates("forward", 64, DEVICE)[0].launch()


def test_no_candidate_runs(a_gpu: None) -> None:
    def seconds() -> float:
        raise RuntimeError("out of resource")

    candidates = configs.candidates("forward", 64, DEVICE)
    with pytest.raises(RuntimeError, match="no configuration of forward"):
        tune.fastest("forward", candidates, seconds, lambda: True)


def test_what_is_wrong_is_not_timed(a_gpu: None) -> None:
    wrong, right = configs.candidates("forward", 64, DEVICE)[:2]

    def is_right() -> bool:
        return launch(64) == right.launch()

    def seconds() -> float:
        assert is_right()
        return 1.0

    with pytest.warns(UserWarning, match=r"Config\(block_q=128.* computes something else"):
        assert tune.fastest("forward", (wrong, right), seconds, is_right) == right


def pipeline(kernel: str = "forward", head_dim: int = 128) -> Pipeline | None:
    """Of the Hopper kernel, where that is asked first."""
    first = next(wanted(kernel, head_dim))
    return first if isinstance(first, Pipeline) else None


def test_hopper_kernels_are_candidates_that_must_win(
    a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "has_gluon", lambda: True)
    assert pipeline() is None
    best = next(c for c in configs.candidates("forward", 128, DEVICE) if isinstance(c, Pipeline))
    tuned.remember("some GPU", {("forward", 128): asdict(best)})
    configs.forget()
    assert pipeline() == best == pipeline(head_dim=72)
    # what it cannot take is launched by default
    assert launch(128) == configs.candidates("forward", 128, DEVICE)[0].launch()
    assert pipeline(head_dim=64) is pipeline("backward_keys") is None
    with configs.trying("forward", configs.candidates("forward", 128, DEVICE)[1]):
        assert pipeline() is None
    monkeypatch.setattr(kernels, "has_gluon", lambda: False)
    assert not any(isinstance(c, Pipeline) for c in configs.candidates("forward", 128, DEVICE))


def test_hopper_kernels_can_be_asked_for(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with configs.pipelined():
        for kernel, rows in HOPPER.items():
            for head_dim, row in rows.items():
                assert pipeline(kernel, head_dim) == row[0]
            if max(rows) < max(configs.BUCKETS):
                assert pipeline(kernel, max(rows) + 1) is None
        monkeypatch.setattr(configs, "family", lambda device: "default")
        assert pipeline() is None
    assert pipeline() is None


def test_hopper_kernels_come_first_where_they_were_found_right(
    a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "_found_right", set())
    default = configs.candidates("forward", 128, DEVICE)[0]
    configs.prefer_pipelines(DEVICE, torch.bfloat16, 96)
    for kernel, rows in HOPPER.items():
        assert pipeline(kernel, 96) == rows[128][0]
        # for that dtype and head dim
        assert pipeline(kernel, 128) is pipeline(kernel, 64) is None
        assert not any(
            isinstance(config, Pipeline)
            for config in configs.wanted(kernel, 96, torch.empty(0, dtype=torch.float16))
        )
    # what it cannot take is launched by default, and a kernel that it has not
    assert launch(96) == default.launch()
    assert pipeline("bias_gradient", 96) is None
    # what tuning has found wins
    won = configs.candidates("forward", 128, DEVICE)[1]
    tuned.remember("some GPU", {("forward", 128): asdict(won)})
    configs.forget()
    assert pipeline("forward", 96) is None and launch(96) == won.launch()
    assert pipeline("backward_keys", 96) == HOPPER["backward_keys"][128][0]


def test_what_another_version_kept_is_forgotten(a_gpu: None) -> None:
    """A field that is no more, and a configuration that was taken out of the table."""
    default = configs.candidates("forward", 64, DEVICE)[0]
    for kept in ({"edge": 64, "no_such_field": 1}, asdict(default) | {"block_q": 4096}):
        tuned.remember("some GPU", {("forward", 64): kept, ("bias_gradient", 64): kept})
        configs.forget()
        assert launch(64) == default.launch()
        assert pipeline("bias_gradient", 64) is None


def test_a_broken_store_is_no_error(a_gpu: None) -> None:
    path = tuned.store()
    path.parent.mkdir()
    path.write_text("{")
    assert launch(64) == configs.candidates("forward", 64, DEVICE)[0].launch()


def test_where_nothing_can_be_kept_it_stays_in_use_here(a_gpu: None) -> None:
    """Minutes of tuning are not lost to a HOME that cannot be written."""
    tuned.store().parent.write_text("a file where the folder should be")
    best = configs.candidates("forward", 64, DEVICE)[1]
    with pytest.warns(UserWarning, match=r"cannot be written .*TRITON_CACHE_DIR"):
        tuned.remember("some GPU", {("forward", 64): asdict(best)})
    configs.forget()
    assert launch(64) == best.launch()


# The candidate with so many warps hangs, crashes, cannot even begin; others end.
CHILD = """
import json, sys, time
print(MARK, flush=True)
for candidate in json.loads(sys.argv[1])["candidates"]:
    if candidate["num_warps"] == HANGS:
        time.sleep(60)
    if candidate["num_warps"] == CRASHES:
        sys.exit("the GPU is lost")
    print(MARK, flush=True)
"""
PROBLEM = (1, 7, 2, 1, 16), torch.float32, DEVICE


def test_what_hangs_or_crashes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    code = CHILD.replace("MARK", repr(trials.MARK)).replace("HANGS", "2").replace("CRASHES", "4")
    command_for = trials.command_for

    def command(*args: Any) -> list[str]:
        return [sys.executable, "-c", code, command_for(*args)[-1]]

    monkeypatch.setattr(trials, "command_for", command)
    candidates = [configs.Config(32, 32, 32, num_warps) for num_warps in (1, 2, 3, 4, 5)]
    with pytest.warns(UserWarning) as said:
        fit = trials.candidates_that_finish("forward", candidates, *PROBLEM, patience=3.0)
    assert [config.num_warps for config in fit] == [1, 3, 5]
    messages = [str(warning.message) for warning in said]
    assert "num_warps=2" in messages[0] and "still running after 3 s" in messages[0]
    assert "num_warps=4" in messages[1] and "the GPU is lost" in messages[1]


def test_without_a_second_process_nothing_that_waits_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('all devices are busy')"]
    monkeypatch.setattr(trials, "command_for", lambda *_: command)
    portable, pipeline = configs.INTERPRETED, HOPPER["forward"][64][0]
    with pytest.warns(UserWarning, match="all devices are busy"):
        fit = trials.candidates_that_finish("forward", [portable, pipeline], *PROBLEM)
    assert fit == [portable]


def test_the_other_process_tries_every_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    candidates = [configs.INTERPRETED, HOPPER["forward"][64][0]]
    marks, reason = trials.count_marks(trials.command_for("forward", candidates, *PROBLEM), 100.0)
    assert (marks, reason) == (3, "exit code 0: ")


def test_a_whole_search(interpreter: Pool) -> None:
    """Every candidate is launched, compared and timed; here all are the interpreter's own."""
    (found,) = interpreter.run(searched, PROBLEM, ranks=1)
    assert set(found) == {"forward", "backward_keys", "backward_queries"}
    for kernel, (best, timed) in found.items():
        candidates = len(configs.TABLE["sm_90"][kernel][64])
        candidates += len(HOPPER[kernel][64]) if kernels.has_gluon() else 0
        assert timed == candidates and isinstance(best, (configs.Config, Pipeline))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_refuses() -> None:
    with pytest.raises(NotImplementedError, match="nothing can be tuned"):
        tune.tune(128)


class Launches:
    """Stands in for a kernel: how it would be launched."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **options: self.options.append(options)


@pytest.mark.parametrize("rows", [37, 1])
def test_rows_of_a_bias_narrow_the_steps(
    rows: int, a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 128 keys a step sm_90 wants 240 KiB of shared memory, and has 227."""
    from usp.kernels.arguments import KernelOptions
    from usp.kernels.attention_forward import attention_forward
    from usp.kernels.portable import launch

    seen = Launches()
    monkeypatch.setattr(launch, "forward_kernel", seen)
    q = torch.empty(1, 37, 2, 64, dtype=torch.bfloat16)
    bias = torch.empty(1, 2, rows, 37)
    options = KernelOptions(None, None, bias, None, None, None, 0, 2, 1, 0.125, 0.0, 0.0, 0)
    with configs.trying("forward", configs.Config(128, 128, 64, 8, 3)):
        attention_forward(q, q, q, options, q.float(), torch.empty(1, 2, 37))
    (found,) = seen.options
    assert (found["BLOCK_K"], found["EDGE"]) == ((64 if rows > 1 else 128), 64)


def test_a_kernel_that_does_not_fit_is_refused() -> None:
    from triton.runtime.errors import OutOfResources

    with (
        pytest.raises(NotImplementedError, match=r"245760.*232448.*tune\(head_dim\)"),
        kernels.launch_guard(torch.empty(0)),
    ):
        raise OutOfResources(245760, 232448, "shared memory")
    with pytest.raises(KeyError), kernels.launch_guard(torch.empty(0)):
        raise KeyError("anything else")


def test_every_row_of_the_table_is_whole() -> None:
    for family, by_kernel in configs.TABLE.items():
        assert set(by_kernel) == set(configs.TABLE["default"]), family
        for kernel, rows in by_kernel.items():
            assert set(rows) == set(configs.BUCKETS), (family, kernel)
            for config in (config for row in rows.values() for config in row):
                step = config.block_q if kernel == "backward_keys" else config.block_k
                assert step % config.edge == 0, (family, kernel, config)
