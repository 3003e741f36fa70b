"""The compiled torch ops, and which of them are there for a device.

Their schemas stand in ``csrc/torch/ops.cpp``, what they compute in
``docs/contract.md``. All but ``cpu_level`` and ``attention_once`` with its backward update tensors
in place and return nothing. A missing or broken library is no error here: ``load_error`` says what
is wrong, the native backend gives that as its reason, and who moves or joins does so with torch's
own ops.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from usp.machine import library
from usp.planning.problem import state_dtype

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}  # HIP tensors are "cuda" to torch


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


def _fake(*args: Any) -> None:
    """In place and without results: shapes were checked by who made the tensors."""


def _fake_once(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, rows, heads = q.shape[:3]
    lse = q.new_empty((batch, heads, rows), dtype=state_dtype(q.dtype))
    return q.new_empty((batch, rows, heads, v.shape[3])), lse


def _fake_once_backward(dout: Tensor, dlse: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in given[:3])


_FAKES = {"attention_once": _fake_once, "attention_once_backward": _fake_once_backward}


def _load() -> str | None:
    error = library.load()
    if error is None:
        for name in library.OPS:
            if name != "cpu_level":
                torch.library.register_fake(f"usp::{name}", _FAKES.get(name, _fake))
    return error


_LOAD_ERROR = _load()
