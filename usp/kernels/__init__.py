"""Triton kernels, for NVIDIA and AMD. Nothing here imports Triton until a kernel is asked for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor


@cache
def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (``TRITON_INTERPRET=1``): on CPU, slowly."""
    # asked without importing Triton, which takes a second
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "on", "yes", "true")


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:
        return False


@cache
def unavailable() -> str | None:
    """Why no kernel can run in this process, or None."""
    if not _installed():
        return "Triton is not installed: pip install triton (pip's torch for GPUs brings it)"
    if interpreted():
        return _interpreter_fails()
    if not torch.cuda.is_available():
        return "torch sees no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
    return None


def _interpreter_fails() -> str | None:
    """Why it cannot run here: until 3.7 it takes arrays of one element for numbers, NumPy does not.

    Source:
        github.com/triton-lang/triton/issues/9171; the release notes of NumPy 2.4.
    """
    try:
        import numpy
    except ImportError:
        return "Triton's interpreter needs NumPy: pip install numpy"
    import triton

    if _release(triton.__version__) >= (3, 7) or _release(numpy.__version__) < (2, 4):
        return None
    return (
        f"the interpreter of Triton {triton.__version__} fails with NumPy {numpy.__version__}: "
        "pip install 'numpy<2.4', or Triton 3.7 or newer"
    )


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


@cache
def has_gluon() -> bool:
    """Whether this Triton has the Gluon that the Hopper kernels are written in: 3.6 or newer."""
    if not _installed():
        return False
    try:
        import triton

        found = importlib.util.find_spec("triton.experimental.gluon.nvidia.hopper")
    except ImportError:
        return False
    return found is not None and _release(triton.__version__) >= (3, 6)


@cache
def architecture(device: torch.device) -> str:
    """What kernels are compiled and tuned for: "sm_90", "gfx90a"; of other devices the type."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def reason_against(device_type: str) -> str | None:
    """Why no kernel can take tensors of that device, or None."""
    missing = unavailable()
    if missing is not None:
        return missing
    wanted = "cpu" if interpreted() else "cuda"
    if device_type != wanted:
        where = "in the interpreter on cpu" if interpreted() else "on a GPU"
        return f"its kernels run {where}, the tensors are on {device_type}"
    return None


def can_take(*tensors: Tensor) -> bool:
    """Whether kernels that move or merge tensors can take these."""
    if reason_against(tensors[0].device.type) is not None:
        return False
    return all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in tensors)


@contextmanager
def launch_guard(tensor: Tensor) -> Iterator[None]:
    """Around launches: Triton launches on the current device, in here that of the tensor.

    Raises:
        NotImplementedError: in here a kernel was too large for the device; gives both sizes.
    """
    try:
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            yield
    except Exception as error:
        # by name: it has moved between versions of Triton
        if type(error).__name__ != "OutOfResources":
            raise
        raise NotImplementedError(
            f"a Triton kernel does not fit this device ({error}): "
            "usp.kernels.tune.tune(head_dim) finds one that does, if there is one; or ask for "
            "another backend"
        ) from error
