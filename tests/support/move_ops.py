"""Every implementation that runs without a GPU of the ops that pass over memory once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from usp_build import native, torch_install
from wheels import ROOT

from usp.ops import native as ops

# CPU kernels, and the GPU's sources with NVIDIA's warps and AMD's waves.
SUBJECTS = [
    pytest.param("cpu", id="native"),
    pytest.param("gpu_32", id="gpu_emulated-warps_of_32", marks=pytest.mark.device_code),
    pytest.param("gpu_64", id="gpu_emulated-waves_of_64", marks=pytest.mark.device_code),
]
_LOADED: dict[str, Path] = {}


def names(implementations: Iterable[str]) -> list[Any]:
    """Of those that ``usp.ops`` chooses from; Triton's are interpreted."""
    device_code = {"triton": pytest.mark.device_code}
    return [pytest.param(name, marks=device_code.get(name, ())) for name in implementations]


def implementation(name: str, folder: Path) -> Any:
    """What has ``attention_delta``, ``state_merge``, ``pack`` and ``unpack`` as attributes."""
    if name == "cpu":
        if ops.load_error() is not None:
            pytest.skip(f"compiled ops: {ops.load_error()}")
        return torch.ops.usp
    library(name, folder)
    return getattr(torch.ops, f"usp_gpu_emulated_{name.removeprefix('gpu_')}")


def library(name: str, folder: Path) -> Path:
    """The emulated GPU's, compiled and loaded once in a process."""
    if name not in _LOADED:
        _LOADED[name] = _build(name.removeprefix("gpu_"), folder)
        torch.ops.load_library(_LOADED[name])
    return _LOADED[name]


def _build(wave_size: str, folder: Path) -> Path:
    torch_found = torch_install.installed_torch()
    assert torch_found is not None
    common = ("-O1", "-x", "c++", f"-DUSP_GPU_EMULATED_WAVE={wave_size}")
    binding = (
        *(*native.STABLE_ABI, f"-isystem{torch_found.include}"),
        f"-DUSP_GPU_EMULATED_OPS=usp_gpu_emulated_{wave_size}",
    )
    gpu = ROOT / "csrc" / "gpu"
    stems = ("attention_delta", "state_merge", "pack")
    sources = (*(gpu / f"{stem}.cu" for stem in stems), gpu / "emulated" / "simt.cpp")
    units = [native.Unit(ROOT / "tests" / "cpp" / "gpu_emulated_ops.cpp", (*common, *binding))]
    units += [native.Unit(source, common) for source in sources]
    links = (f"-L{torch_found.lib}", "-ltorch_cpu")
    library = native.Library(f"usp_gpu_emulated_{wave_size}.so", tuple(units), links)
    native.compile_libraries(ROOT, native.find_compiler(), [library], folder / "objects", folder)
    return folder / library.filename
