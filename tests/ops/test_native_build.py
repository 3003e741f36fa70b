"""How the compiled extension is found, what it says of itself, and what is said where it is not."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import CSRC
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from usp_build import native

from usp.machine import cpu, library


def load_error_with(library: Path) -> str:
    """What a fresh interpreter says of an ops library; it is loaded once, at import."""
    program = "from usp.ops import native as ops; print(ops.load_error())"
    environment = {**os.environ, "USP_OPS_LIBRARY": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=250,
    )
    return done.stdout.strip()


def test_a_broken_library_is_a_reason_and_no_error(tmp_path: Path) -> None:
    broken = tmp_path / "_ops.so"
    broken.write_text("not a library")
    assert load_error_with(broken).startswith(f"{broken} does not load: ")
    assert load_error_with(tmp_path / "missing.so").startswith(f"{tmp_path}/missing.so does not")


def test_a_library_of_another_version_is_a_reason(tmp_path: Path) -> None:
    """A shared library that defines none of the ops."""
    other = tmp_path / "_ops.so"
    command = [*native.find_compiler(), "-shared", "-fPIC", "-x", "c++", os.devnull]
    subprocess.run([*command, "-o", str(other)], check=True)
    assert load_error_with(other).startswith(f"{other} has no usp::attention_forward, it belongs")


def test_a_package_without_the_library_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("USP_OPS_LIBRARY", raising=False)
    monkeypatch.setattr(library, "PACKAGE", tmp_path)
    load = library.load.__wrapped__  # what is loaded stays loaded
    assert library.path() is None
    assert load() == "it was not built"
    (tmp_path / "_build.json").write_text('{"reason": "no C++ compiler found"}')
    assert load() == "it was not built: no C++ compiler found"


def test_the_level_is_the_highest_or_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.load() is not None:
        pytest.skip(f"compiled ops: {library.load()}")
    monkeypatch.delenv("USP_CPU_CAPABILITY", raising=False)
    machine = cpu.level()
    arm = ("default", "neon_bf16")
    kind = arm if platform.machine() in ("aarch64", "arm64") else cpu.LEVELS[:-1]
    for wanted in cpu.LEVELS:
        monkeypatch.setenv("USP_CPU_CAPABILITY", wanted)
        needed = "avx512_bf16" if wanted == "amx_emulated" else wanted
        there = wanted in kind and kind.index(needed) <= kind.index(machine)
        assert cpu.level() == (wanted if there else machine)
    monkeypatch.setenv("USP_CPU_CAPABILITY", "sse9")
    with pytest.raises(RuntimeError, match="'sse9'; expected default, avx2"):
        cpu.level()


class Heard(TorchFunctionMode):
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def test_no_mode_sees_how_the_level_is_found() -> None:
    if library.load() is not None:
        pytest.skip(f"compiled ops: {library.load()}")
    cpu._level.cache_clear()
    with Heard() as heard, FakeTensorMode():
        assert cpu.level() in cpu.LEVELS
    assert not heard.calls


def test_the_levels_are_those_of_the_sources() -> None:
    text = (CSRC / "cpu" / "capability.h").read_text()
    named = dict(re.findall(r'case Capability::(k\w+):\s+return "(\w+)";', text))
    order = re.findall(r"k\w+", re.search(r"enum class Capability {(.*?)}", text)[1])
    assert tuple(named.get(name, "default") for name in order) == cpu.LEVELS
