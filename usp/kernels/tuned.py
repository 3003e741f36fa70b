"""Which configurations won on this machine's GPUs: one small file in Triton's cache folder."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

_won_here: dict[Path, dict[str, dict[str, Any]]] = {}


def store() -> Path:
    """The file."""
    from triton import knobs

    return Path(knobs.cache.dir) / "usp-tuned.json"


def remember(device_name: str, found: dict[tuple[str, int], dict[str, Any]]) -> None:
    """Keep the winner of each (kernel, head dim), for later processes too where they can be."""
    path = store()
    won = {_key(device_name, kernel, size): config for (kernel, size), config in found.items()}
    _won_here.setdefault(path, {}).update(won)
    # ranks may tune at once: a file is there whole or not at all
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(_read(path) | won, indent=1) + "\n")
        scratch.replace(path)
    except OSError as error:
        warnings.warn(
            f"what won stays in use in this process alone, {path} cannot be written ({error}): "
            "set TRITON_CACHE_DIR to a folder that can",
            stacklevel=3,
        )


def recall(device_name: str, kernel: str, size: int) -> dict[str, Any] | None:
    """What won here before, if anything did."""
    path, key = store(), _key(device_name, kernel, size)
    return _won_here.get(path, {}).get(key) or _read(path).get(key)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _key(device_name: str, kernel: str, size: int) -> str:
    import triton

    return f"{device_name}, triton {triton.__version__}, {kernel}, {size}"
