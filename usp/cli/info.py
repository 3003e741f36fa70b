"""``usp info``: what is installed, what was compiled, and what can run here."""

from __future__ import annotations

import argparse
import importlib
import json
import platform

from usp._version import __version__
from usp.cli.console import PACKAGE, table


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
    import torch

    from usp.backends import in_order, order_of
    from usp.backends.preference import measured_on
    from usp.kernels import architecture

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    lines = {}
    for device in devices:
        name = architecture(device)
        there = (backend for backend in in_order(name, device) if backend.unavailable() is None)
        order = ", ".join(backend.NAME for backend in there)
        lines[measured_on(name)] = f"{order}  ({order_of(name, device)[0].why})"
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
    return 0
