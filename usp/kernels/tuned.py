"""Which configurations won on this machine's GPUs: one small file in Triton's cache folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from usp.machine import kept

_won_here: dict[Path, dict[str, dict[str, Any]]] = {}


def store() -> Path:
    """The file."""
    return kept.folder() / "usp-tuned.json"


def remember(device_name: str, found: dict[tuple[str, int], dict[str, Any]]) -> None:
    """Keep the winner of each (kernel, head dim), for later processes too where they can be."""
    path = store()
    won = {_key(device_name, kernel, size): config for (kernel, size), config in found.items()}
    _won_here.setdefault(path, {}).update(won)
    try:
        kept.add(path, won)
    except OSError as error:
        warnings.warn(
            f"what won stays in use in this process alone, {path} cannot be written ({error}): "
            "set TRITON_CACHE_DIR to a folder that can",
            stacklevel=3,
        )


def recall(device_name: str, kernel: str, size: int) -> dict[str, Any] | None:
    """What won here before, if anything did."""
    path, key = store(), _key(device_name, kernel, size)
    return _won_here.get(path, {}).get(key) or kept.read(path).get(key)


def _key(device_name: str, kernel: str, size: int) -> str:
    import triton

    return f"{device_name}, triton {triton.__version__}, {kernel}, {size}"
