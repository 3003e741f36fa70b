"""Which configurations won on this machine's GPUs: one small file in Triton's cache folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def store() -> Path:
    """The file."""
    from triton import knobs

    return Path(knobs.cache.dir) / "usp-tuned.json"


def remember(device_name: str, found: dict[tuple[str, int], dict[str, Any]]) -> None:
    """Keep the winner of each (kernel, head dim) for later processes."""
    path = store()
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _read(path)
    for (kernel, size), config in found.items():
        known[_key(device_name, kernel, size)] = config
    # ranks may tune at once: a file is there whole or not at all
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(known, indent=1) + "\n")
    scratch.replace(path)


def recall(device_name: str, kernel: str, size: int) -> dict[str, Any] | None:
    """What won here before, if anything did."""
    return _read(store()).get(_key(device_name, kernel, size))


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _key(device_name: str, kernel: str, size: int) -> str:
    import triton

    return f"{device_name}, triton {triton.__version__}, {kernel}, {size}"
