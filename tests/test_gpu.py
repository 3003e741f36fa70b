"""What only a GPU can show: ``make test-gpu``. ``make test`` leaves it out."""

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
from gpu_worker import nccl_of_one_rank, run_on_gpu, start_gpu_worker
from hypothesis import given, settings
from judge import assert_close, join, oracle
from native_case import Case, Inputs, computed, error_scale, expected, largest, make_inputs
from pool import Pool
from test_native_ops import HEADS, SPANS
from test_property import cases
from test_triton_kernels import OPTIONS
from torch import Tensor
from triton_interpreter import Kernels

import usp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
LONG = Case(batch=1, lq=997, lk=1511, heads=(3, 1, 2), head_dim=64, value_head_dim=64)


@pytest.fixture(scope="module")
def gpu_pool() -> Iterator[Pool]:
    pool = Pool(setup=start_gpu_worker)
    yield pool
    pool.close()


def assert_right_on_gpu(case: Case) -> None:
    x = make_inputs(case)
    on_gpu = Inputs(
        **{
            name: value.cuda() if isinstance(value, Tensor) else value
            for name, value in vars(x).items()
        }
    )
    with torch.device("cuda"):  # the states and sums that `computed` makes
        got = computed(case, on_gpu, Kernels)
        again = computed(case, on_gpu, Kernels)
    want = expected(case, x)
    for name, reference in want.items():
        assert torch.equal(got[name], again[name]), f"{name} differs from run to run"
        result = got[name].cpu().double()
        empty = reference == -torch.inf
        assert torch.equal(result == -torch.inf, empty), name
        worst = largest(torch.where(empty, 0, result - reference))
        scale = error_scale(case, x, want, name)
        assert worst <= TOLERANCE[case.dtype] * scale, f"{name} is off by {worst:.2e} in {case}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option: str, dtype: torch.dtype) -> None:
    case = replace(Case(batch=2, lq=131, lk=257), **OPTIONS[option])
    assert_right_on_gpu(replace(case, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [16, 40, 64, 72, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("span", SPANS)
def test_long_blocks(span: str, head_dim: int, dtype: torch.dtype) -> None:
    case = replace(LONG, span=span, head_dim=head_dim, value_head_dim=head_dim, dtype=dtype)
    assert_right_on_gpu(replace(case, prior_keys=130))


@pytest.mark.parametrize("heads", HEADS)
def test_shared_key_heads(heads: tuple[int, int, int]) -> None:
    assert_right_on_gpu(replace(LONG, heads=heads, dtype=torch.bfloat16, span="causal"))


def on_triton(case: MeshCase) -> MeshCase:
    """The nearest case that the kernels take."""
    dtype = "float32" if case.dtype == "float64" else case.dtype
    magnitude = min(case.magnitude, 1.0)
    return replace(case, dtype=dtype, backend="triton", magnitude=magnitude)


@settings(max_examples=2 * settings.default.max_examples)
@given(case=cases())
def test_every_mesh_and_option_equals_dense_attention(gpu_pool: Pool, case: MeshCase) -> None:
    case = on_triton(case)
    results = gpu_pool.run(run_on_gpu, case, ranks=case.ranks)
    assert_close(case, join(case, results), oracle(case))


def test_nccl_with_one_rank(tmp_path: Path) -> None:
    code = f"import gpu_worker; gpu_worker.{nccl_of_one_rank.__name__}({str(tmp_path / 'store')!r})"
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr


def test_rows_that_lie_2_to_the_30_elements_apart() -> None:
    rows, width, gap = 3, 16, 2**30 + 16
    case = Case(batch=1, lq=rows, lk=rows, heads=(1, 0, 1), head_dim=width, value_head_dim=width)
    case = replace(case, dtype=torch.bfloat16, span="causal")
    x = make_inputs(case)
    far = torch.empty(rows * gap, dtype=case.dtype, device="cuda")
    far = far.as_strided(x.k.shape, (1, gap, 1, 1)).copy_(x.k)
    want = expected(case, replace_all(x, x.k))
    on_gpu = replace_all(Inputs(**vars(x)), far)
    on_gpu.first, on_gpu.stop = (end.cuda() for end in (x.first, x.stop))
    on_gpu.dlse = x.dlse.cuda()
    with torch.device("cuda"):
        got = computed(case, on_gpu, Kernels)
    for name, reference in want.items():
        assert largest(got[name].cpu().double() - reference) <= 1e-2, name


def replace_all(x: Inputs, same: Tensor) -> Inputs:
    return Inputs(**{**vars(x), "q": same, "k": same, "v": same, "dout": same})


class Sampled:
    """Self-attention over many tokens, judged at some rows and keys in fp64."""

    def __init__(self, length: int, heads: int, head_dim: int, window: int | None) -> None:
        torch.manual_seed(0)
        shape = (1, length, heads, head_dim)
        self.window = window
        self.q, self.k, self.v, self.dout = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)
        )
        leaves = [x.requires_grad_() for x in (self.q, self.k, self.v)]
        left = None if window is None else window - 1
        out, lse = usp.long_context_attention(
            *leaves, causal=True, window_size=(left, 0), return_lse=True, backend="triton"
        )
        self.grads = torch.autograd.grad(out, leaves, self.dout)
        self.out, self.lse = out.detach(), lse.detach()

    def check(self, head: int, places: list[int]) -> None:
        q, k, v, out, dout = (
            x.detach()[0, :, head] for x in (self.q, self.k, self.v, self.out, self.dout)
        )
        dq, dk, dv = (x[0, :, head] for x in self.grads)
        lse = self.lse[0, head].double()
        for place in places:
            low = 0 if self.window is None else max(0, place + 1 - self.window)
            keys = slice(low, place + 1)
            scores = k[keys].double() @ q[place].double() * q.shape[1] ** -0.5
            p = scores.softmax(0)
            wanted = p @ v[keys].double()
            self.assert_close("out", out[place], wanted)
            self.assert_close("lse", lse[place], scores.logsumexp(0))
            ds = p * (v[keys].double() @ dout[place].double() - dout[place].double() @ wanted)
            self.assert_close("dq", dq[place], ds @ k[keys].double() * q.shape[1] ** -0.5)
            # a key's column needs the lse of every row that sees it: those just judged by sample
            high = len(q) if self.window is None else min(len(q), place + self.window)
            rows = slice(place, high)
            column = q[rows].double() @ k[place].double() * q.shape[1] ** -0.5
            p = (column - lse[rows]).exp()
            self.assert_close("dv", dv[place], p @ dout[rows].double())
            delta = (dout[rows].double() * out[rows].double()).sum(1)
            ds = p * (dout[rows].double() @ v[place].double() - delta)
            self.assert_close("dk", dk[place], ds @ q[rows].double() * q.shape[1] ** -0.5)

    @staticmethod
    def assert_close(name: str, ours: Tensor, wanted: Tensor) -> None:
        error = largest(ours.double() - wanted)
        assert error <= 1e-2 * max(largest(wanted), 1e-2), f"{name} is off by {error:.2e}"


@pytest.mark.timeout(600)
def test_188160_tokens() -> None:
    length = 188_160
    Sampled(length, 2, 128, None).check(1, [0, 1, 127, 94_081, length - 129, length - 1])


@pytest.mark.timeout(600)
def test_1048576_tokens() -> None:
    length = 2**20
    Sampled(length, 1, 64, None).check(0, [0, 5, 65_537, 700_001, length - 1])


@pytest.mark.timeout(600)
def test_more_than_2_to_the_31_elements() -> None:
    length, heads = 2**20, 17
    assert length * heads * 128 > 2**31
    Sampled(length, heads, 128, 1024).check(heads - 1, [0, 1023, 1024, 999_983, length - 1])


@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer here")
def test_small_cases_under_compute_sanitizer() -> None:
    tests = f"{__file__}::test_every_option"
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    command += ["-k", "bfloat16 and (span_gaps or everything or bias_1H1K or head_dim_80)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
