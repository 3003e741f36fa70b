"""Kernels of the hub: only by name, and only what is on this machine unless a caller says so."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import stand_ins
import torch

import usp
from usp.backends import in_order
from usp.testing import dense_attention

HALF, DOUBLE = torch.float16, torch.float64
REPOSITORY = "kernels-community/flash-attn2"


class Hub:
    """What ``kernels`` is to usp: it knows some repositories, of which some are here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[dict[str, Any]] = []
        self.is_here, self.module = True, module_of(stand_ins.flash2_functions())
        kernels, hub = new_module("kernels"), new_module("huggingface_hub")
        self.constants = new_module("huggingface_hub.constants")
        self.constants.HF_HUB_OFFLINE = False
        kernels.get_kernel, hub.constants = self.get_kernel, self.constants
        for module in (kernels, hub, self.constants):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def get_kernel(self, repository: str, **options: Any) -> ModuleType:
        offline = self.constants.HF_HUB_OFFLINE
        self.asked.append({"repository": repository, "offline": offline, **options})
        if offline and not self.is_here:
            raise FileNotFoundError("Cannot find a local snapshot")
        return self.module


def new_module(name: str) -> Any:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    return module


def module_of(functions: Any) -> Any:
    module = new_module("a_kernel_of_the_hub")
    vars(module).update(vars(functions))
    return module


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    backends: Any = importlib.import_module("usp.backends")
    monkeypatch.setattr(backends, "_hub", backends.HubBackends())
    return Hub(monkeypatch)


@pytest.mark.parametrize("version", [2, 3])
def test_a_kernel_is_a_backend_by_its_name_and_never_auto(hub: Hub, version: int) -> None:
    if version == 3:
        hub.module = module_of(stand_ins.flash3_functions())
    name = usp.use_kernel(REPOSITORY, version=4, device_type="cpu")
    assert name == REPOSITORY and usp.backends()[name] == "can run here"
    assert hub.asked == [
        {"repository": REPOSITORY, "offline": True, "version": 4, "backend": "cpu"}
    ]
    assert not hub.constants.HF_HUB_OFFLINE
    assert name not in [backend.NAME for backend in in_order("cpu")]
    q, k, v = (torch.randn(2, 31, h, 16).half() for h in (4, 2, 2))
    for options in ({"causal": True}, {"window_size": (5, 2)}, {"cu_seqlens": (0, 9, 31)}):
        leaves, exact = ([x.to(t).requires_grad_() for x in (q, k, v)] for t in (HALF, DOUBLE))
        out = usp.long_context_attention(*leaves, backend=name, **options)
        want, _ = dense_attention(*exact, **options)
        grads = torch.autograd.grad(out.float().sum(), leaves)
        wanted = torch.autograd.grad(want.sum(), exact)
        for got, right in zip((out, *grads), (want, *wanted), strict=True):
            torch.testing.assert_close(got.double(), right, rtol=0, atol=1e-2)


def test_it_is_fetched_only_where_the_caller_says_so(hub: Hub) -> None:
    hub.is_here = False
    with pytest.raises(NotImplementedError, match=r"Cannot find a local .*\(download=True fetches"):
        usp.use_kernel(REPOSITORY, revision="v1", device_type="cpu")
    assert REPOSITORY not in usp.backends() and not hub.constants.HF_HUB_OFFLINE
    usp.use_kernel(REPOSITORY, revision="v1", download=True, device_type="cpu")
    assert [x["offline"] for x in hub.asked] == [True, False]
    assert hub.asked[1]["revision"] == "v1" and "version" not in hub.asked[1]


@pytest.mark.parametrize("which", [{}, {"version": 1, "revision": "main"}], ids=str)
def test_exactly_one_version_is_named(hub: Hub, which: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="either version= or revision="):
        usp.use_kernel(REPOSITORY, **which)
    with pytest.raises(ValueError, match="'owner/name', got 'flash-attn2'"):
        usp.use_kernel("flash-attn2", version=1)
    assert not hub.asked


def test_private_functions_are_found_beside_the_public_one(hub: Hub) -> None:
    inner = module_of(stand_ins.flash2_functions())

    def flash_attn_func() -> None: ...

    flash_attn_func.__module__ = inner.__name__
    sys.modules[inner.__name__] = inner
    hub.module = new_module("outer")
    try:
        with pytest.raises(NotImplementedError, match="has no flash_attn_func"):
            usp.use_kernel(REPOSITORY, version=1, device_type="cpu")
        hub.module.flash_attn_func = flash_attn_func
        usp.use_kernel(REPOSITORY, version=1, device_type="cpu")
        del inner._flash_attn_varlen_backward
        with pytest.raises(NotImplementedError, match="has no _flash_attn_varlen_backward"):
            usp.use_kernel(REPOSITORY, version=1, device_type="cpu")
    finally:
        del sys.modules[inner.__name__]


def test_an_early_flash_attn_3_is_refused(hub: Hub) -> None:
    """Its window was a pair."""

    def _flash_attn_forward(q: Any, k: Any, v: Any, window_size: tuple[int, int]) -> None: ...

    functions = stand_ins.flash3_functions()
    functions._flash_attn_forward = _flash_attn_forward
    hub.module = module_of(functions)
    with pytest.raises(NotImplementedError, match="_flash_attn_forward with window_size_left"):
        usp.use_kernel(REPOSITORY, version=1, device_type="cpu")


def test_without_the_library_it_says_what_to_install(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder of its name, which Python would import, is not the library."""
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for holds_folder in (False, True):
        monkeypatch.setitem(sys.modules, "kernels", None)
        if holds_folder:
            monkeypatch.delitem(sys.modules, "kernels")
        with pytest.raises(NotImplementedError, match="pip install kernels"):
            usp.use_kernel(REPOSITORY, version=1, device_type="cpu")
    if not torch.cuda.is_available():
        monkeypatch.undo()
        Hub(monkeypatch)
        with pytest.raises(NotImplementedError, match="torch sees no GPU"):
            usp.use_kernel(REPOSITORY, version=1)
