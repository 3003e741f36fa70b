"""The library of compiled ops: where it lies, whether it loads, what its build recorded.

It is no module of Python: torch loads it, so that one file serves every Python, and, through
torch's stable ABI, every torch from 2.10 on.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parents[1]
OPS = (
    "attention_forward",
    "attention_delta",
    "attention_backward",
    "attention_once",
    "attention_once_backward",
    "state_merge",
    "pack",
    "unpack",
    "linear_forward",
    "linear_backward",
    "cpu_level",
)


def path() -> Path | None:
    """``USP_OPS_LIBRARY`` (an instrumented build, say), or the package's own; None without one."""
    named = os.environ.get("USP_OPS_LIBRARY")
    if named:
        return Path(named)
    built = (path for path in PACKAGE.glob("_ops.*") if path.suffix in (".so", ".dylib", ".pyd"))
    return next(built, None)


def record() -> dict[str, Any]:
    """What the build said of itself (``build_backend/usp_build/command.py``); may be empty."""
    try:
        found = json.loads((PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@cache
def load() -> str | None:
    """Let torch load it, once: why it could not, or None where the ops are there."""
    file = path()
    if file is None:
        reason = record().get("reason")
        return f"it was not built: {reason}" if reason else "it was not built"
    try:
        torch.ops.load_library(file)
    except OSError as error:
        return f"{file} does not load: {error}"
    for name in OPS:
        if not hasattr(torch.ops.usp, name):
            return f"{file} has no usp::{name}, it belongs to another version: build it again"
    return None
