"""What only a GPU can show: ``make test-gpu``. ``make test`` rehearses it on a CPU.

``test_gpu_large.py`` holds what fills the memory of one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import Case as MeshCase
from contract_cases import HEADS, ROWS, SPANS
from gpu_checks import (
    DTYPES,
    Subject,
    assert_merged,
    assert_packed,
    assert_right_twice,
    subject,
)
from gpu_worker import one_rank_alone, run_on_device, start_gpu_worker
from hypothesis import given, seed, settings
from judge import assert_close, join, oracle
from kernel_call import Call
from mesh_cases import CORNERS, cases
from pool import Pool

__all__ = ["subject"]  # the fixture
pytestmark = pytest.mark.gpu
LONG = Call(batch=1, lq=997, lk=1511, heads=(3, 1, 2), head_dim=64, value_head_dim=64)
SHORT = replace(LONG, lq=37, lk=41)  # for a rehearsal
HEAD_DIMS = (16, 40, 64, 72, 80, 96, 128, 192, 256)
PARTS = 8  # of the property test, so that processes can share it


@pytest.fixture(scope="module")
def gpu_pool(device: str) -> Iterator[Pool]:
    pool = Pool(setup=start_gpu_worker)
    yield pool
    pool.close()


def assert_right_if_taken(subject: Subject, case: Call) -> None:
    reason = subject.reason_against(case.dtype, max(case.head_dim, case.value_head_dim))
    if reason is not None:
        pytest.skip(f"{subject.name}: {reason}")
    assert_right_twice(subject, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ROWS)
def test_every_option(option: str, dtype: torch.dtype, subject: Subject) -> None:
    small = Call(batch=2, lq=131, lk=257) if subject.device == "cuda" else SHORT
    case = replace(small, **ROWS[option])
    assert_right_if_taken(subject, replace(case, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("span", SPANS)
def test_long_blocks(span: str, head_dim: int, dtype: torch.dtype, subject: Subject) -> None:
    case = replace(LONG, prior_keys=130) if subject.device == "cuda" else SHORT
    case = replace(case, span=span, head_dim=head_dim, value_head_dim=head_dim, dtype=dtype)
    assert_right_if_taken(subject, case)


@pytest.mark.parametrize("heads", HEADS)
def test_shared_key_heads(heads: tuple[int, int, int], subject: Subject) -> None:
    case = LONG if subject.device == "cuda" else SHORT
    assert_right_twice(subject, replace(case, heads=heads, dtype=torch.bfloat16, span="causal"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_partial_results_are_merged(dtype: torch.dtype, subject: Subject) -> None:
    from usp.kernels import state_merge

    merge = torch.ops.usp.state_merge if subject.name == "native" else state_merge.merge_into
    assert_merged(subject, merge, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
def test_heads_are_packed(dtype: torch.dtype, subject: Subject) -> None:
    from usp.ops.pack import PACKERS

    name = "native" if subject.name == "native" else "triton"
    assert_packed(subject, PACKERS[name].pack, dtype)


def on_gpu(case: MeshCase, device: str) -> MeshCase:
    """The nearest case that kernels take there; every head dim is a kernel to compile: two of them.

    "auto" and the reference take fp64, too.
    """
    if case.backend in ("sdpa", "native"):
        native = Subject("native", device).reason_against() is None
        case = replace(case, backend="native" if native else "triton")
    if case.backend not in ("auto", "reference"):
        magnitude = min(case.magnitude, 1.0)
        dtypes = {"float64": "bfloat16", "float32": "float16"}
        if case.backend == "triton":
            dtypes = {"float64": "float32"}
        case = replace(case, dtype=dtypes.get(case.dtype, case.dtype), magnitude=magnitude)
    dims = {"head_dim": 5 if case.head_dim < 5 else 8, "value_dim": 3 if case.value_dim < 5 else 8}
    return replace(case, **dims)


def judge_on(pool: Pool, device: str, case: MeshCase) -> None:
    results = pool.run(run_on_device, case, device, ranks=case.ranks)
    assert_close(case, join(case, results), oracle(case))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_mesh_and_option_equals_dense_attention(
    part: int, gpu_pool: Pool, device: str
) -> None:
    """The whole property test of ``test_property.py`` on tensors there, gloo between the ranks."""

    @seed(part)
    @settings(max_examples=settings.default.max_examples // 4 if device == "cuda" else 2)
    @given(case=cases())
    def judged(case: MeshCase) -> None:
        judge_on(gpu_pool, device, on_gpu(case, device))

    judged()


@pytest.mark.parametrize("case", CORNERS, ids=repr)
def test_corners(case: MeshCase, gpu_pool: Pool, device: str) -> None:
    judge_on(gpu_pool, device, on_gpu(case, device))


def test_nccl_with_one_rank(tmp_path: Path, device: str) -> None:
    store = str(tmp_path / "store")
    code = f"import gpu_worker; gpu_worker.{one_rank_alone.__name__}({store!r}, {device!r})"
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr


def test_tuning_finds_what_runs(
    device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from usp.kernels import configs, tune, tuned

    if device == "cpu":
        pytest.skip("there is nothing to tune in the interpreter")
    monkeypatch.setattr(tuned, "store", lambda: tmp_path / "tuned.json")
    configs.forget()
    found = tune.tune(64, seq_len=1024, num_heads=4)
    assert set(found) == {"forward", "backward_keys", "backward_queries"}
    here = Subject("triton", device)
    assert_right_twice(here, replace(LONG, dtype=torch.bfloat16, span="causal"))
    configs.forget()


# Of test_every_option, one of each kind: -k takes no brackets.
SANITIZED = "bfloat16 and (span_gaps or everything or bias_1H1K or head_dims_80 or carried_state)"


def sanitizer_tests(device: str) -> list[str]:
    """A pytest of a few small cases."""
    tests = f"{__file__}::{test_every_option.__name__}"
    plain = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    return [*plain, f"--device={device}", "-k", SANITIZED, tests]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_small_cases_under_compute_sanitizer(tool: str, device: str) -> None:
    if device == "cpu":  # which tests it would run
        command = [*sanitizer_tests(device), "--collect-only"]
    elif shutil.which("compute-sanitizer") is None:
        pytest.skip("no compute-sanitizer here")
    else:
        check = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        command = [*check, *sanitizer_tests(device)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
