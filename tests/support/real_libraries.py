"""Attention libraries of others in a worker, on CPU tensors.

flash-attn's own Python runs over a stand-in for its compiled extension. Its kernels for AMD, and
aiter's, are Triton: they run themselves, in its interpreter.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from dataclasses import replace
from importlib.machinery import FileFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import stand_ins
import torch
from cases import Case
from library_cases import Ring, here, on_cpu, put_in_table
from places import ROOT
from torch import Tensor

from usp.backends import _self_check
from usp.backends.library import aiter, flash2
from usp.backends.library.backend import LibraryBackend
from usp.backends.library.call import How
from usp.backends.library.table import ROWS
from usp.planning.problem import Traits

FOLDER = ROOT / "build" / "libraries"
FLASH_ATTN, FLASH_ATTN_TRITON, AITER = "flash-attn 2", "flash-attn 2 (Triton)", "aiter (Triton)"
_OPS = (*flash2.NAMES, *flash2.PACKED_NAMES)


def folder() -> Path:
    """Where they are installed, or the test is skipped."""
    if not (FOLDER / "wanted").is_file():
        pytest.skip("flash-attn and aiter are not installed: make test-doors installs them")
    return FOLDER


def start_over_stand_in() -> None:
    """In a fresh worker: flash-attn with an extension of ours."""
    sys.path.insert(0, str(FOLDER))
    extension: Any = ModuleType("flash_attn_2_cuda")
    for name in ("fwd", "bwd", "varlen_fwd", "varlen_bwd"):
        setattr(extension, name, getattr(stand_ins.Extension, name))
    sys.modules["flash_attn_2_cuda"] = extension
    _take_cpu_tensors()
    put_in_table(_cpu_backend(FLASH_ATTN, flash2.interface))


def start_interpreted() -> None:
    """In a fresh worker: flash-attn's and aiter's Triton kernels."""
    from triton_interpreter import start_interpreter

    os.environ["FLASH_ATTENTION_TRITON_AMD_ENABLE"] = "TRUE"
    start_interpreter()
    sys.path.insert(0, str(FOLDER))
    _pretend_amd()
    _enter_aiter()
    _take_cpu_tensors()
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    put_in_table(_cpu_backend(FLASH_ATTN_TRITON, flash2.interface, dtypes))
    put_in_table(_cpu_backend(AITER, aiter.load, dtypes))


def _cpu_backend(title: str, load: Any, dtypes: Any = None) -> LibraryBackend:
    (record,) = (record for record in ROWS if record.title == title)
    # versions and names are asked for as ever
    changes = {"load": load, "missing": here if title == AITER else record.missing}
    return on_cpu(replace(record, dtypes=dtypes or record.dtypes), **changes)


def _take_cpu_tensors() -> None:
    """flash-attn registers its functions as ops of CUDA tensors alone."""
    from flash_attn import flash_attn_interface

    for name in _OPS:
        op = getattr(flash_attn_interface, name)
        op.register_kernel("cpu")(op._init_fn)


def _pretend_amd() -> None:
    """Both ask Triton for the device when they are imported, and there is none."""
    import triton
    from triton.runtime import driver

    target = SimpleNamespace(backend="hip", arch="gfx90a", warp_size=64)
    driver._active = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    autotune = triton.autotune

    def of_arguments(configs: Any, key: Any, **options: Any) -> Any:
        """Triton 3.9 refuses keys that are no arguments, of which flash-attn has some."""

        def decorated(fn: Any) -> Any:
            return autotune(configs, [x for x in key if x in fn.arg_names], **options)(fn)

        return decorated

    triton.autotune = of_arguments


def _enter_aiter() -> None:
    """Its package imports what ROCm alone has: its Triton files are entered by a side door."""
    sys.path_hooks.insert(0, _of_aiter)
    package: Any = ModuleType("aiter")
    package.__path__, package.logger = [str(FOLDER / "aiter")], logging.getLogger("aiter")
    sys.modules["aiter"] = package
    torch.cuda.current_device = lambda: 0  # type: ignore[assignment]
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment,misc]


def _of_aiter(path: str) -> FileFinder:
    """It asserts that tensors are on a GPU."""
    if not path.startswith(str(FOLDER / "aiter")):
        raise ImportError
    return FileFinder(path, (_WithoutAsserts, [".py"]))


class _WithoutAsserts(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path)
        return compile(source, self.path, "exec", dont_inherit=True, optimize=1)


def uses_triton() -> bool:
    """On a worker: whether flash-attn says so, and does not use its reference in torch."""
    from flash_attn import flash_attn_interface
    from flash_attn.flash_attn_triton_amd.utils import USE_REF

    assert "flash_attn_2_cuda" not in sys.modules
    return bool(flash_attn_interface.USE_TRITON_ROCM and not USE_REF)


def wrong_with(name: str, windows: bool) -> str | None:
    """On a worker: what is said against a library before it is used, if it were to take windows."""
    backends: Any = importlib.import_module("usp.backends")
    (record,) = next(b for b in backends.TABLE if name == b.NAME).records
    backend = LibraryBackend((replace(record, windows=windows),))
    traits = Traits("cpu", torch.float16, 32, 32, 0.2)
    return _self_check.wrong_with(backend, traits, torch.device("cpu"))


def empty_rows() -> list[float]:
    """On a worker: the LSE that flash-attn gives the first of more queries than keys, causal."""
    q, k = torch.ones(1, 37, 1, 32).half(), torch.ones(1, 30, 1, 32).half()
    _, lse = flash2.interface().forward(q, k, k, How(1.0, right=0))
    found: list[float] = lse[0, 0, :7].tolist()
    return found


def ring_results(name: str, ring: Ring) -> dict[str, Tensor]:
    """On a worker: by the backend of that name."""
    backends: Any = importlib.import_module("usp.backends")
    (backend,) = (b for b in backends.TABLE if name == b.NAME)
    assert backend.unavailable() is None
    return ring.results(backend)


def case_results(case: Case) -> dict[str, Tensor]:
    """On a worker: this rank's, by a mesh."""
    from judge import run

    return run(case)
