"""GPU builds on a machine that may have no GPU: what was compiled, and that it loads and works.

One real wheel for each device kind; every check reads that build.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from device_code import (
    ASK_CLANG,
    ASK_NVCC,
    count_instructions,
    cuda_kernels,
    hip_kernels,
    overview,
    table,
)
from gpu_builds import BUILD_TIMEOUT_S, Builds, Built
from programs import module
from usp_build import native, toolchains
from wheels import ROOT

pytestmark = [pytest.mark.device_code, pytest.mark.timeout(BUILD_TIMEOUT_S + 300)]

SOURCES = [path.stem for path in native.device_sources(ROOT)]
ARCHITECTURES = {"cuda": ("sm_80", "sm_90"), "hip": ("gfx90a", "gfx942")}
# File -> architecture -> the instructions that it must use there. Other files use none.
_NVIDIA = {"sm_80": {"HMMA"}, "sm_90": {"HMMA"}}
_SMALL, _LARGE = "MFMA 16x16x16", "MFMA 32x32x8"  # by head dim, see csrc/gpu/tiles.h
_BOTH = _NVIDIA | {"gfx90a": {_SMALL, _LARGE}, "gfx942": {_SMALL, _LARGE}}
MATRIX_INSTRUCTIONS: dict[str, dict[str, set[str]]] = {
    "attention_forward": _BOTH,
    "attention_backward": _BOTH,
    "bias_backward": _NVIDIA | {"gfx90a": {_SMALL}, "gfx942": {_SMALL}},
}
# Instructions of a warp's round over whole tiles, and clocks of shared memory: a tenth above what
# nvcc 13.0 makes for sm_80 or sm_90, whichever is more.
COUNTS = {
    ("forward", 64): (770, 860),
    ("keys", 64): (650, 1580),
    ("queries", 64): (435, 790),
    ("forward", 128): (675, 1425),
    ("keys", 128): (560, 1650),
    ("queries", 128): (410, 1280),
}
GPU_OPS = (
    *("attention_forward", "attention_delta", "attention_backward"),
    *("attention_once", "attention_once_backward"),
    *("state_merge", "pack", "unpack"),
)


@pytest.fixture(scope="module", params=["cuda", "hip"])
def built(request: pytest.FixtureRequest, gpu_builds: Builds) -> Built:
    return gpu_builds.of(request.param)


def run(built: Built, program: str) -> str:
    """What a program prints that has the unpacked wheel first on its path."""
    environ = {**os.environ, "PYTHONPATH": str(built.folder), "OMP_NUM_THREADS": "1"}
    environ.pop("USP_OPS_LIBRARY", None)
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env=environ, cwd=built.folder, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- what was compiled


def test_every_file_is_compiled_for_every_architecture(
    built: Built, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(f"\n{overview(built.kernels)}")
    there = {(kernel.source, kernel.architecture) for kernel in built.kernels}
    assert there == {(s, a) for s in SOURCES for a in ARCHITECTURES[built.kind]}


def test_no_kernel_spills(built: Built) -> None:
    spilling = [kernel for kernel in built.kernels if kernel.spills or kernel.scratch]
    assert not spilling, f"through memory for lack of registers:\n{table(spilling)}"


def test_the_matrix_unit_is_used(built: Built) -> None:
    for source in SOURCES:
        for architecture in ARCHITECTURES[built.kind]:
            wanted = MATRIX_INSTRUCTIONS.get(source, {}).get(architecture, set())
            here = [
                k for k in built.kernels if (k.source, k.architecture) == (source, architecture)
            ]
            found = {name for kernel in here for name in kernel.instructions}
            assert found == wanted, f"{source} for {architecture}"


@pytest.mark.parametrize("built", ["hip"], indirect=True)
def test_loads_overlap_with_products(built: Built) -> None:
    """AMD has no asynchronous copies: the next tile waits in registers."""
    walks = ("attention_forward", "attention_backward")
    late = [k for k in built.kernels if k.source in walks and not k.loads_ahead]
    assert not late, f"loads are waited for before the products:\n{table(late)}"


@pytest.mark.parametrize("built", ["hip"], indirect=True)
def test_operands_are_read_in_whole_registers(built: Built) -> None:
    """Where columns of an operand run along rows in the LDS, registers transpose what is read."""
    narrow = [
        f"{k.narrow_reads} {k.name} {k.architecture}" for k in built.kernels if k.narrow_reads
    ]
    assert not narrow, "reads of 16 bits from the LDS:\n" + "\n".join(narrow)


@pytest.mark.parametrize("built", ["cuda"], indirect=True)
def test_main_loops_keep_their_counts(built: Built) -> None:
    """As ``usp bench machine_code`` prints them."""
    pytest.importorskip("triton", reason="its wheel has the disassembler")
    from csrc_loops import SOURCES, texts_of
    from sass import main_loop

    model, over = module("_machine_code"), []
    for target in ("cuda:80", "cuda:90"):
        architecture = target.replace("cuda:", "compute_")
        texts = texts_of(built.kept / f"{source}.{architecture}.cubin" for source in SOURCES)
        for kernel, head_dim in COUNTS:
            code = main_loop(texts[kernel, head_dim])
            taken = model.counts(code)["all"], model.cycles(target, code)["shared"]
            most = COUNTS[kernel, head_dim]
            if any(n > m for n, m in zip(taken, most, strict=True)):
                over.append((target, kernel, head_dim, taken, most))
    assert not over


@pytest.mark.parametrize("built", ["hip"], indirect=True)
def test_sums_stay_out_of_the_registers_of_the_matrix_unit(built: Built) -> None:
    """Where two waves share a SIMD (tiles.h), they are rescaled or added to where they lie."""
    shared = [
        k
        for k in built.kernels
        if k.name.startswith(("forward_kernel", "query_kernel")) and "192, true" not in k.name
    ]
    moving = [k for k in shared if k.moves]
    assert shared and not moving, table(moving)


def test_the_table_names_files_that_are_there() -> None:
    assert set(MATRIX_INSTRUCTIONS) <= set(SOURCES)


# -- what was built, on a machine without a GPU


def test_the_build_says_what_it_built(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((built.folder / "usp" / "_build.json").read_text())
    assert record["targets"] == ["cpu", built.kind]
    assert record["architectures"] == list(ARCHITECTURES[built.kind])
    shown = run(built, "from usp.cli import main; main(['info'])")
    with capsys.disabled():
        print(f"\n{shown}")
    assert f"built for cpu, {built.kind}" in shown
    assert f"{', '.join(record['architectures'])}, by {record['device_compiler']}" in shown
    assert f"usp: built cpu, {built.kind} kernels with" in built.log


def test_the_library_loads_and_has_the_ops_of_both_devices(built: Built) -> None:
    program = f"""
import torch
from usp.ops import native as ops
assert ops.load_error() is None, ops.load_error()
has = torch._C._dispatch_has_kernel_for_dispatch_key
for op in {GPU_OPS}:
    for key in ("CPU", "CUDA", "Meta"):
        print(op, key, has("usp::" + op, key))
"""
    assert run(built, program).split("\n")[:-1] == [
        f"{op} {key} True" for op in GPU_OPS for key in ("CPU", "CUDA", "Meta")
    ]


def test_cpu_attention_works_from_the_same_library(built: Built) -> None:
    program = """
import torch, usp
from usp.testing import dense_attention
torch.manual_seed(0)
q, k, v = (torch.randn(2, 37, heads, 24, dtype=torch.float64) for heads in (6, 3, 3))
out = usp.long_context_attention(q, k, v, causal=True, backend="native")
print((out - dense_attention(q, k, v, causal=True)[0]).abs().max().item() < 1e-12)
"""
    assert run(built, program) == "True\n"


def test_fake_gpu_tensors_go_through_the_ops(built: Built) -> None:
    program = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from usp.ops import native as ops
with FakeTensorMode():
    out, lse = torch.empty(2, 5, 3, 8, device="cuda"), torch.empty(2, 3, 5, device="cuda")
    assert torch.ops.usp.state_merge(out, lse, out.bfloat16(), lse) is None
    message = torch.empty(out.numel() * 4, dtype=torch.uint8, device="cuda")
    assert torch.ops.usp.pack([out], message) is None
    assert torch.ops.usp.unpack(message, [out]) is None
    print(out.device)
"""
    assert run(built, program) == "cuda:0\n"


def test_cmake_compiles_the_device_files_alone(built: Built, tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    ninja = native.find_ninja()
    options = [
        f"-DUSP_GPU={built.kind}",
        "-DCMAKE_DISABLE_FIND_PACKAGE_Torch=ON",
        "-DUSP_TESTS=OFF",
    ]
    options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    options += [f"-DPython3_EXECUTABLE={sys.executable}"]
    subprocess.run([cmake, "-S", str(ROOT), "-B", str(tmp_path), *options], check=True)
    one = f"csrc/gpu/state_merge.{built.kind}.o"
    subprocess.run([ninja, "-C", str(tmp_path), one], check=True)
    assert (tmp_path / one).stat().st_size > 0
    commands = [ninja, "-C", str(tmp_path), "-t", "commands", "usp_gpu"]
    listed = subprocess.run(commands, check=True, capture_output=True, text=True).stdout
    assert [name for name in SOURCES if f"/{name}.cu -o" in listed] == SOURCES
    assert listed.count(".cu -o") == len(SOURCES)


# -- the readers themselves


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1};\n" * 3, {"HMMA": 3}),
        ("v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]", {"MFMA 32x32x8": 1}),
        ("v_mfma_f32_16x16x16_f16 v[0:3], v[4:5], v[6:7], v[0:3]", {"MFMA 16x16x16": 1}),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1}, [%r2]; fma.rn.f32", {}),
    ],
)
def test_matrix_instructions_are_counted(text: str, counts: dict[str, int]) -> None:
    assert count_instructions(text) == counts


def test_spills_are_seen(built: Built) -> None:
    """A kernel that keeps more in registers than there are: the readers must say so."""
    kernel = """
#include "gpu/gpu.h"
namespace usp::gpu {
USP_KERNEL USP_LAUNCH_BOUNDS(1024, 1) void greedy(float* x) {
  float held[300];
  USP_UNROLL
  for (int i = 0; i < 300; ++i) held[i] = x[i * 1024 + thread_index()];
  barrier();
  USP_UNROLL
  for (int i = 0; i < 300; ++i) x[i * 1024 + thread_index()] = held[i] * held[(i * 7) % 300];
}
}  // namespace usp::gpu
"""
    folder = built.folder.parent / "greedy"
    folder.mkdir()
    (folder / "greedy.cu").write_text(kernel)
    device = toolchains.find(built.kind)
    include = f"-I{ROOT / 'csrc'}"
    command = [*device.command, *device.flags, include, "-c", "greedy.cu", "-o", "greedy.o"]
    ask = {"NVCC_APPEND_FLAGS": f"{ASK_NVCC}{folder}", "CCC_OVERRIDE_OPTIONS": ASK_CLANG}
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **ask}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    log = done.stdout + done.stderr
    kernels = (
        cuda_kernels(log, folder) if built.kind == "cuda" else hip_kernels(folder.glob("*-gfx*.s"))
    )
    assert {kernel.architecture for kernel in kernels} == set(ARCHITECTURES[built.kind])
    for found in kernels:
        assert found.spills > 0 or found.scratch > 0
        with pytest.raises(AssertionError, match="greedy"):
            test_no_kernel_spills(replace(built, kernels=(found,)))
