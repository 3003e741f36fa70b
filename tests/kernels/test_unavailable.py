"""Where no kernel can run, the backend says why."""

from __future__ import annotations

import sys

import pytest

from usp import kernels
from usp.backends import triton as backend
from usp.planning.problem import Traits

triton = pytest.importorskip("triton")
numpy = pytest.importorskip("numpy")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "interpreted", lambda: True)
    monkeypatch.setattr(kernels, "unavailable", kernels.unavailable.__wrapped__)


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "works"),
    [
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.6.0+rocm7.1", "3.0.0.dev0+git", False),
        ("3.7.0", "2.4.0", True),
        ("4.0.0", "2.10.1", True),
    ],
)
def test_an_interpreter_that_its_numpy_breaks(
    triton_version: str,
    numpy_version: str,
    works: bool,
    interpreted: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton, "__version__", triton_version)
    monkeypatch.setattr(numpy, "__version__", numpy_version)
    reasons = backend.reasons_against(Traits("cpu", backend._DTYPES[0], 16, 16, 0.25))
    if works:
        assert reasons == ()
    else:
        (reason,) = reasons
        assert triton_version in reason and numpy_version in reason and "numpy<2.4" in reason


def test_an_interpreter_without_numpy(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert kernels.unavailable() == "Triton's interpreter needs NumPy: pip install numpy"
