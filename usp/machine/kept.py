"""Small files in the user's cache folder: what later processes need not find out again.

They lie where Triton keeps its kernels (``TRITON_CACHE_DIR``), which must be writable for these.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl


def folder() -> Path:
    """Triton's cache folder, found without importing Triton."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))


def read(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where it cannot be read or is no such file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def add(path: Path, more: dict[str, Any]) -> None:
    """Let ``more`` into a file. Processes may do so at once: it is there whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_text(json.dumps(read(path) | more, indent=1) + "\n")
    scratch.replace(path)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """In here no other process that asks for the same file; where files have no locks, several."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = path.with_name(f"{path.name}.lock").open("w")
    except OSError:
        yield
        return
    with lock:
        if sys.platform != "win32":
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
