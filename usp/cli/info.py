"""``usp info``: what is installed, what was compiled, and what can run here."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from typing import TYPE_CHECKING

from usp._version import __version__
from usp.cli.console import PACKAGE, table

if TYPE_CHECKING:
    import torch


def build_lines() -> list[tuple[str, str]]:
    """What is known of the compiled extension: what was built, and what runs here."""
    record_file = PACKAGE / "_build.json"
    record = json.loads(record_file.read_text()) if record_file.is_file() else {}
    try:
        extension = importlib.import_module("usp._C")
    except ImportError as error:
        reason = record.get("reason") or f"{error} (USP_BUILD=none, or run from plain sources)"
        return [("extension", f"not built: {reason}")]
    built = extension.build_info()
    names = [name for name, there in built["targets"].items() if there]
    lines = [("extension", f"built for {', '.join(names)}")]
    if record:
        lines.append(("", f"by {record['compiler']}, beside torch {record['torch']}"))
    if built["architectures"]:
        by = f", by {record['device_compiler']}" if "device_compiler" in record else ""
        lines.append((f"{names[-1]} kernels for", f"{', '.join(built['architectures'])}{by}"))
    for kind, reason in record.get("left_out", {}).items():
        lines.append((f"{kind} kernels", f"not built: {reason}"))
    lines.append(("CPU kernels use", cpu_levels(extension.cpu_capability())))
    return lines


def cpu_levels(highest: str) -> str:
    """The instruction set of the CPU kernels, and that of bf16 where it is another."""
    import torch

    from usp.ops import native

    if native.load_error() is not None:
        return highest
    of_fp32, of_bf16 = (native.cpu_level(dtype) for dtype in (torch.float32, torch.bfloat16))
    if of_bf16 == highest:
        return highest
    return f"{of_fp32}; bf16: {of_bf16}, the fastest here"


def device_lines() -> list[tuple[str, str]]:
    """The devices torch sees."""
    import torch

    lines = [("devices", f"cpu: {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        lines.append(("", f"cuda:{index}: {torch.cuda.get_device_name(index)}"))
    return lines


def preference_lines() -> list[tuple[str, str]]:
    """What "auto" asks, in order, on each kind of device that is here, and why."""

    from usp.backends import in_order, order_of
    from usp.backends.preference import measured_on
    from usp.kernels import architecture

    lines = {}
    for device in devices():
        name = architecture(device)
        there = (backend for backend in in_order(name, device) if backend.unavailable() is None)
        order = ", ".join(backend.NAME for backend in there)
        lines[measured_on(name)] = f"{order}  ({order_of(name, device)[0].why})"
    return list(lines.items())


def devices() -> list[torch.device]:
    """The CPU and every GPU."""
    import torch

    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus]


def verdict_lines() -> list[tuple[str, str]]:
    """What was checked here before its first use, and what came of it."""
    from usp.machine.verdicts import kept_of

    lines = {}
    for device in devices():
        for name, wrong in kept_of(device).items():
            lines[f"{device.type}: {name}"] = "right" if wrong is None else f"left out: {wrong}"
    return list(lines.items())


def run(_: argparse.Namespace) -> int:
    """Version, compiled extension, devices, backends."""
    import torch

    import usp

    lines = [
        ("usp", f"{__version__}  ({PACKAGE})"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", str(torch.__version__)),
        *build_lines(),
        *device_lines(),
    ]
    print(table(lines, indent=""))
    print("\nbackends")
    print(table(usp.backends().items()))
    print('\nbackend="auto" takes the first that can')
    print(table(preference_lines()))
    checked = verdict_lines()
    if checked:
        print("\nchecked on this machine, by this usp, torch and driver")
        print(table(checked))
    return 0
