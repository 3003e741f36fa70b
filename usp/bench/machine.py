"""Where and when something was measured, and with what."""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import usp
from usp.backends import native
from usp.kernels import architecture
from usp.machine import cpu, place

PACKAGE = Path(__file__).resolve().parents[1]
FORMAT = 1


def environment() -> dict[str, Any]:
    """Date, commit, CPU, versions, load."""
    capability = cpu.level()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **commit(),
        "usp": usp.__version__,
        "cpu": cpu.model(),
        "cpu_vendor": cpu.vendor(),
        "cpu_capability": capability,
        "cpu_capability_of_torch": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": load(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def load() -> list[float] | None:
    """Average over 1, 5 and 15 minutes, where the system knows it."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def commit() -> dict[str, Any]:
    """Of the sources, if this is their folder: another repository around it is not theirs."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return {"commit": None}

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
            )
        except OSError:
            return ""
        return done.stdout.strip()

    found = git("rev-parse", "HEAD") or None
    return {"commit": found, "uncommitted_changes": bool(git("status", "--porcelain"))}


def of_device(device: str) -> dict[str, Any]:
    """A GPU: name, architecture, driver, and the libraries that torch runs on it."""
    if device != "cuda":
        return {"device": device}
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name(),
        "gpus": torch.cuda.device_count(),
        "architecture": architecture(torch.device(device)),
        "driver": place.driver(torch.device(device)),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
    }


def header(program: str, device: str, arguments: dict[str, Any], clock: str) -> dict[str, Any]:
    """The first record of a file."""
    # where it was written is nobody else's
    told = {n: value for n, value in arguments.items() if n != "json" and _is_plain(value)}
    return {
        "record": "header",
        "format": FORMAT,
        "program": program,
        **environment(),
        **of_device(device),
        "clock": clock,
        "arguments": told,
    }


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def introduce(program: str, **more: Any) -> dict[str, Any]:
    """The header of a program of the source tree, printed; ends the program where the kernels to be
    measured are missing."""
    missing = native.unavailable()
    if missing is not None:
        sys.exit(f"nothing to measure: {missing}")
    found = {**header(program, "cpu", {}, more.pop("clock", "wall")), **more}
    print("\n".join(f"{name}: {value}" for name, value in found.items()))
    return found


def keep_freed_memory() -> bool:
    """Have malloc keep pieces of up to 32 MiB that are freed, for the next calls; whether it does.

    glibc gives large ones back to the system at some calls and not at others, by what else lies in
    the heap, and a short call whose results are fresh pages waits for them. Only glibc can be told.
    Source: mallopt(3); the threshold from which pieces are mapped ends at 32 MiB.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt(trim_threshold, 1 << 30)) and bool(mallopt(mmap_threshold, 32 << 20))


def in_words(header: dict[str, Any]) -> str:
    """The machine, in a line."""
    where = header.get("gpu") or f"{header['cpu']}, {header['cpu_capability']}"
    threads = "" if header.get("gpu") else f", {header['threads']} threads"
    return (
        f"{where}{threads}; torch {header['torch']}, Python {header['python']}, "
        f"usp {header.get('usp') or 'at'} {(header.get('commit') or 'of no commit')[:12]}"
    )


def warnings(header: dict[str, Any]) -> list[str]:
    """What speaks against keeping the figures."""
    found = []
    average = header.get("load_average")
    if average and average[0] > 0.5 and header["clock"] == "wall":
        found.append(
            f"others use this machine (load {average[0]:.1f}): wall times are worth a look alone"
        )
    if header.get("uncommitted_changes"):
        found.append("the sources hold changes that are not committed")
    if header["device"] == "cpu" and header["cpu_capability"] == "none":
        found.append("the compiled kernels are not there: usp info says why")
    return found


def is_interactive() -> bool:
    return sys.stderr.isatty()
