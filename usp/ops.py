"""Loads the compiled torch ops ``usp::attention_forward`` and ``usp::attention_backward``.

Their schemas stand in ``csrc/ops.cpp``, what they compute in ``docs/design.md``, "The kernel
contract". Both update tensors in place and return nothing. A missing or broken library is no
error here: :func:`load_error` says what is wrong, and the native backend gives that as its reason.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent
_OPS = (
    "attention_forward",
    "attention_delta",
    "attention_backward",
    "state_merge",
    "pack",
    "unpack",
)


def load_error() -> str | None:
    """Why the compiled ops could not be loaded, or None where they are there."""
    return _LOAD_ERROR


def library_path() -> Path | None:
    """The ops library: ``USP_OPS_LIBRARY`` (an instrumented build, say), or the package's own."""
    named = os.environ.get("USP_OPS_LIBRARY")
    if named:
        return Path(named)
    built = (path for path in _PACKAGE.glob("_ops.*") if path.suffix in (".so", ".dylib", ".pyd"))
    return next(built, None)


def _load() -> str | None:
    path = library_path()
    if path is None:
        return f"it was not built{_reason_recorded_by_the_build()}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error}"
    for name in _OPS:
        torch.library.register_fake(f"usp::{name}", _fake)
    return None


def _reason_recorded_by_the_build() -> str:
    try:
        reason = json.loads((_PACKAGE / "_build.json").read_text())["reason"]
    except (OSError, ValueError, KeyError):
        return ""
    return f": {reason}" if reason else ""


def _fake(*args: Any) -> None:
    """In place and without results: shapes were checked by who made the tensors."""


_LOAD_ERROR = _load()
