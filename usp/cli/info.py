"""``usp info``: the machine, what was built, what can run here and why not, what to install."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

import usp
from usp._version import __version__
from usp.backends import in_order, order_of
from usp.backends.preference import measured_on
from usp.cli.console import PACKAGE, Exit, add_json, present, table
from usp.kernels import architecture
from usp.machine import cpu, library
from usp.machine.verdicts import kept_of
from usp.ops import native

if TYPE_CHECKING:
    from usp.cli.console import Commands

# What serves what, and whether it serves on a machine without a GPU of that make.
OPTIONAL = (
    ("rich, matplotlib, skimage", "demo", "usp demo, and pictures of usp plan and usp trace", ""),
    ("shtab", "completions", "usp completions", ""),
    ("triton", "triton", "usp's kernels for NVIDIA and AMD GPUs", "gpu"),
    ("flash_attn", "flash", "flash-attn's kernels", "cuda"),
    ("kernels", "hub", "kernels of the Hugging Face hub (usp.use_kernel)", "gpu"),
)
Lines = list[tuple[str, str]]


def add_arguments(commands: Commands) -> argparse.ArgumentParser:
    """Describe ``usp info`` to the parser of the command line."""
    parser = commands.add_parser(
        "info", help="the machine, the build, backends and why not, what to install"
    )
    add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Look, and say it."""
    found = {
        "package": PACKAGE,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "machine": machine(),
        "extension": extension(),
        "backends": usp.backends(),
        "order": preferences(),
        "checked": verdicts(),
        "install": advice(),
    }
    present(arguments, found, lambda: text(found))
    return Exit.RIGHT


def machine() -> dict[str, Any]:
    """Processor, threads, memory in bytes, and the GPUs that torch sees."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpus = [torch.cuda.get_device_properties(device) for device in devices()[1:]]
    return {
        "cpu": cpu.model(),
        "threads": torch.get_num_threads(),
        "memory": pages,
        "gpus": [{"name": gpu.name, "memory": gpu.total_memory} for gpu in gpus],
    }


def extension() -> dict[str, Any]:
    """What is known of the compiled ops: as the build recorded it, and what runs here."""
    record, error = library.record(), native.load_error()
    if error is not None:
        said = record.get("reason") or f"{error} (USP_BUILD=none, or run from plain sources)"
        return {**record, "targets": [], "reason": said}
    of_bf16 = cpu.level_of(torch.bfloat16)
    return {**record, "reason": None, "cpu_level": cpu.level(), "cpu_level_of_bf16": of_bf16}


def preferences() -> dict[str, dict[str, Any]]:
    """What "auto" asks, in order, on each kind of device that is here, and why."""
    found = {}
    for device in devices():
        name = architecture(device)
        there = (backend for backend in in_order(name, device) if backend.unavailable() is None)
        why = order_of(name, device)[0].why
        found[measured_on(name)] = {"backends": [b.NAME for b in there], "why": why}
    return found


def devices() -> list[torch.device]:
    """The CPU and every GPU."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus]


def verdicts() -> dict[str, str]:
    """What was checked here before its first use, and what came of it."""
    return {
        f"{device.type}: {name}": "right" if wrong is None else f"left out: {wrong}"
        for device in devices()
        for name, wrong in kept_of(device).items()
    }


def advice() -> dict[str, str]:
    """What is not installed and would serve here: what for, by the command that installs it."""
    here = {""}
    if torch.cuda.is_available():
        here |= {"gpu", "hip" if torch.version.hip else "cuda"}
    found = {
        f"pip install 'usp[{extra}]'": what
        for modules, extra, what, where in OPTIONAL
        if where in here and not all(find_spec(name) for name in modules.split(", "))
    }
    if native.load_error() is not None:
        found["apt-get install g++, or another C++20 compiler, and install usp again"] = (
            "compiled kernels: without them a CPU computes in plain torch"
        )
    elif "gpu" in here and not native.is_there("attention_forward", "cuda"):
        kind = "hip" if torch.version.hip else "cuda"
        found[f"USP_BUILD={kind} pip install . in the sources (it says what it lacks)"] = (
            "usp's compiled kernels for this GPU"
        )
    return found


def text(found: dict[str, Any]) -> str:
    """All of it, for a person."""
    here = found["machine"]
    lines: Lines = [
        ("usp", f"{__version__}  ({found['package']})"),
        ("python", found["python"]),
        ("torch", found["torch"]),
        ("machine", f"{here['cpu']}, {_gib(here['memory'])}"),
        ("devices", f"cpu: {here['threads']} threads"),
    ]
    lines += [
        ("", f"cuda:{i}: {gpu['name']}, {_gib(gpu['memory'])}")
        for i, gpu in enumerate(here["gpus"])
    ]
    parts = [table([*lines, *_extension_lines(found["extension"])], indent="")]
    parts.append(f"backends\n{table(found['backends'].items())}")
    order = [(n, f"{', '.join(o['backends'])}  ({o['why']})") for n, o in found["order"].items()]
    parts.append(f'backend="auto" takes the first that can\n{table(order)}')
    if found["checked"]:
        said = "checked on this machine, by this usp, torch and driver"
        parts.append(f"{said}\n{table(found['checked'].items())}")
    if found["install"]:
        parts.append(f"what could be installed\n{table(found['install'].items())}")
    return "\n\n".join(parts)


def _extension_lines(built: dict[str, Any]) -> Lines:
    if built["reason"]:
        return [("extension", f"not built: {built['reason']}")]
    names = built.get("targets", ["cpu"])
    lines = [("extension", f"built for {', '.join(names)}")]
    if "compiler" in built:
        lines.append(("", f"by {built['compiler']}, beside torch {built['torch']}"))
    if "architectures" in built:
        which = ", ".join(built["architectures"])
        lines.append((f"{names[-1]} kernels for", f"{which}, by {built['device_compiler']}"))
    for kind, reason in built.get("left_out", {}).items():
        lines.append((f"{kind} kernels", f"not built: {reason}"))
    level, of_bf16 = built["cpu_level"], built["cpu_level_of_bf16"]
    other = "" if of_bf16 == level else f"; bf16: {of_bf16}, the fastest here"
    return [*lines, ("CPU kernels use", f"{level}{other}")]


def _gib(size: int) -> str:
    return f"{size / 2**30:.0f} GiB"
