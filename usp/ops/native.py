"""Loads the compiled torch ops, and says which of them are there for a device.

Their schemas stand in ``csrc/torch/ops.cpp``, what they compute in
``docs/contract.md``. All update tensors in place and return nothing. A missing or
broken library is no error here: ``load_error`` says what is wrong, the native backend gives
that as its reason, and who moves or joins does so with torch's own ops.
"""

from __future__ import annotations

import importlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parents[1]
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}  # HIP tensors are "cuda" to torch
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


@lru_cache(maxsize=64)
def is_there(name: str, device_type: str) -> bool:
    """Whether the library has the op ``usp::name`` for that kind of device."""
    if _LOAD_ERROR is not None or device_type not in _DISPATCH_KEYS:
        return False
    key = _DISPATCH_KEYS[device_type]
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"usp::{name}", key)


def cpu_level(dtype: torch.dtype) -> str:
    """The instruction set that computes inputs of a dtype on this CPU.

    For bf16 it is the fastest of those that the machine has, which the first call finds out; or
    the one that ``USP_CPU_CAPABILITY`` says.
    """
    extension = importlib.import_module("usp._C")
    place = torch.ops.usp.cpu_level(torch.empty(0, dtype=dtype))
    return str(extension.cpu_capabilities_built()[place])


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
        if not hasattr(torch.ops.usp, name):
            return f"{path} has no usp::{name}, it belongs to another version: build it again"
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
