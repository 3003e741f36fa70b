"""A kernel by the hub's own loader, from a repository made on disk: nothing is fetched."""

from __future__ import annotations

import importlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import library

import usp
from usp.testing import dense_attention

pytestmark = pytest.mark.library
REPOSITORY = "kernels-community/flash-attn2"
SOURCE = """
from .flash_attn_interface import flash_attn_func
"""
INTERFACE = """
import stand_ins

globals().update(vars(stand_ins.flash2_functions()))

def flash_attn_func(*args, **options):
    raise NotImplementedError("usp calls what returns an LSE")
"""


def make_repository(folder: Path) -> None:
    """Python alone, in a variant for the CPU."""
    about = {"name": "flash-attn2", "id": "made_here", "version": 4, "license": "apache-2.0"}
    about |= {"backend": {"type": "cpu"}, "python-depends": []}
    for variant in ("torch-cpu", "torch-universal"):
        package = folder / "build" / variant
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(SOURCE)
        (package / "flash_attn_interface.py").write_text(INTERFACE)
        (package / "metadata.json").write_text(json.dumps(about))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    library("kernels")
    backends: Any = importlib.import_module("usp.backends")
    monkeypatch.setattr(backends, "_hub", backends.HubBackends())


def test_a_kernel_on_this_machine(
    no_hub: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_repository(tmp_path)
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPOSITORY}={tmp_path}")
    name = usp.use_kernel(REPOSITORY, version=4, device_type="cpu")
    q, k, v = (torch.randn(1, 37, h, 16).bfloat16() for h in (4, 2, 2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = usp.long_context_attention(*leaves, causal=True, backend=name)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want, _ = dense_attention(*exact, causal=True)
    wanted = torch.autograd.grad(want.sum(), exact)
    for got, expected in zip((out, *grads), (want, *wanted), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-2)


def test_one_that_is_not_here_is_not_fetched(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*args: Any) -> None:
        raise AssertionError("somebody was asked")

    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(NotImplementedError, match=r"\(download=True fetches it\)"):
        usp.use_kernel("kernels-community/not-here", version=1, device_type="cpu")
