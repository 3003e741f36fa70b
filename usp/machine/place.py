"""What a finding on this machine holds for: device, driver, torch, usp, and versions beside."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from usp._version import __version__
from usp.machine import cpu

_PACKAGE = Path(__file__).resolve().parents[1]
_DRIVERS = ("/sys/module/nvidia/version", "/sys/module/amdgpu/version")


def place(device: torch.device, packages: Sequence[str] = ()) -> str:
    """A sentence that changes when a finding may no longer hold.

    Args:
        packages: Names of distributions whose versions matter too.
    """
    versions = (f"{name} {version_of(name)}" for name in packages)
    return ", ".join((name_of(device), driver(device), _software(), *versions))


def name_of(device: torch.device) -> str:
    """Of a GPU its name; of a CPU its model and the instruction set in use."""
    if device.type == "cpu":
        return f"{cpu.model()}, {cpu.level()}"
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(device.type)


@cache
def driver(device: torch.device) -> str:
    """What runs a GPU, as far as it can be read without a process of its own."""
    if device.type != "cuda":
        return "no driver"
    of_torch = getattr(torch._C, "_cuda_getDriverVersion", None)
    said = [f"CUDA {of_torch()}"] if of_torch is not None and torch.version.cuda else []
    for path in map(Path, _DRIVERS):
        if path.is_file():
            said.append(path.read_text().strip())
    return f"driver {' '.join(said) or 'unknown'}"


@cache
def version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


@cache
def _software() -> str:
    """Versions, and when the newest of our kernels was written: while usp is worked on, both."""
    ours = (*_PACKAGE.glob("kernels/**/*.py"), *_PACKAGE.glob("backends/**/*.py"))
    compiled = (x for x in _PACKAGE.iterdir() if x.suffix in (".so", ".pyd", ".dylib"))
    newest = max((x.stat().st_mtime_ns for x in (*ours, *compiled)), default=0)
    runtime = torch.version.cuda or torch.version.hip or "none"
    return f"torch {torch.__version__}, runtime {runtime}, usp {__version__} of {newest}"
