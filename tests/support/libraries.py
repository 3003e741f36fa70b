"""Libraries that the doors are for, where they are installed."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from places import ROOT

# scripts/libraries.sh VENV science
SCIENCE = ROOT / "build" / "science"
INSTALL = "make test-doors installs it"
_kept: list[Any] = []


def library(name: str) -> ModuleType:
    """A library, or the test is skipped."""
    import_torchvision()  # which others import where it is there
    if str(SCIENCE) not in sys.path:
        sys.path.append(str(SCIENCE))
    reason = f"{name} is not installed: {INSTALL}"
    found: ModuleType = pytest.importorskip(name, reason=reason)
    if found.__file__ is None:  # a folder of that name, such as tests/kernels
        pytest.skip(reason)
    return found


def import_torchvision() -> None:
    """A torchvision built for another torch registers shapes of ops that it then cannot load."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        ops = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            ops.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(ops)
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        importlib.import_module("torchvision")
