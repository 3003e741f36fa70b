"""What CPU this is: whose, its instruction set, and which of its cores this process may use."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

from usp.machine import library

# The instruction sets of the compiled kernels, in the order of ``csrc/cpu/capability.h``.
LEVELS = ("default", "avx2", "avx512", "avx512_bf16", "amx_emulated", "amx", "neon_bf16")
# The names that makers go by, and what machines say of themselves.
_SIGNS = {"Intel": ("Intel",), "AMD": ("AuthenticAMD", "AMD")}


def vendor_of(name: str) -> str:
    """Who made a processor of that name, "AMD EPYC" say; its first word where that is unknown."""
    known = (who for who, signs in _SIGNS.items() if any(sign in name for sign in signs))
    return next(known, "") or next(iter(name.split()), "unknown")


@cache
def cpuinfo() -> dict[str, str]:
    """What Linux says of the last core; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {name.strip(): text.strip() for name, _, text in (line.partition(":") for line in lines)}


def model() -> str:
    """Name, family and model: "AMD EPYC / 25 / 17"."""
    found = cpuinfo()
    said = [found[name] for name in ("model name", "cpu family", "model") if name in found]
    return " / ".join(said) or platform.processor() or platform.machine()


def cores() -> tuple[int, ...]:
    """Numbers of the cores that this process may use; a container's quota of time is not seen."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def running_system() -> str:
    """A word that processes share if and only if their cores are those of one machine."""
    try:  # alike in all containers, which may have other names
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


@cache
def vendor() -> str:
    """ "AMD", "Intel", or what the machine says of itself."""
    return vendor_of(cpuinfo().get("vendor_id") or model())


def level() -> str:
    """The highest instruction set that the compiled kernels have here, "avx512_bf16" say.

    The one that ``USP_CPU_CAPABILITY`` says; "none" where nothing was compiled.
    """
    return _level(os.environ.get("USP_CPU_CAPABILITY"))


@cache
def _level(_: str | None) -> str:
    return "none" if library.load() is not None else level_of(torch.float32)


def level_of(dtype: torch.dtype) -> str:
    """The instruction set that computes inputs of a dtype here; the compiled ops must be there.

    For bf16 it is the fastest of those that the machine has, which the first call finds out; or
    the one that ``USP_CPU_CAPABILITY`` says.

    Raises:
        RuntimeError: ``USP_CPU_CAPABILITY`` names none; lists them.
    """
    # asked in the middle of what a mode records or fakes
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        return LEVELS[torch.ops.usp.cpu_level(torch.empty(0, dtype=dtype, device="cpu"))]


def kind() -> str:
    """What a result of CPU kernels holds for: "cpu AMD avx512_bf16"."""
    return f"cpu {vendor()} {level()}"
