"""Building and installing: one version, honest refusals, and never a second torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import setup_env
import torch
from places import ROOT
from usp_build import hooks, native, targets, toolchains, torch_install
from wheels import build_wheel, copy_sources, open_wheel

import usp
from usp._version import __version__

VERSION = __version__


def fake_torch(folder: Path, version: str, headers: bool = True) -> Path:
    """A site folder that holds as much of a torch as the build looks at."""
    info = folder / f"torch-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    if headers:
        (folder / "torch" / "include").mkdir(parents=True)
    return folder


# -- one version, true metadata


def test_the_version_stands_in_one_place() -> None:
    """Everything else reads it: pyproject, CMake, the C++ module, the command line."""
    suffixes = {".py", ".toml", ".txt", ".cpp", ".h", ".in", ".cfg"}
    skipped = {"build", "dist", ".git"}
    holders = []
    for folder, below, names in os.walk(ROOT):
        below[:] = [name for name in below if name not in skipped and not name.startswith(".venv")]
        paths = [Path(folder, name) for name in names]
        holders += [
            str(path.relative_to(ROOT))
            for path in paths
            if path.suffix in suffixes and VERSION in path.read_text("utf-8")
        ]
    assert holders == ["usp/_version.py"]


def test_installed_metadata() -> None:
    try:
        installed = metadata.distribution("usp")
    except metadata.PackageNotFoundError:
        pytest.skip("usp runs from its sources here, it is not installed")
    assert installed.version == VERSION
    assert installed.metadata["License-Expression"] == "Apache-2.0"
    required = installed.requires or []
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.10"]
    text = (ROOT / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    named = set(re.findall(r"^([\w-]+) = \[", extras, re.MULTILINE))
    assert set(installed.metadata.get_all("Provides-Extra") or []) == named > {"demo", "dev"}
    assert any(entry.name == "usp" for entry in installed.entry_points)


def test_the_installed_package_is_what_is_tested() -> None:
    """The sources in this folder must not hide an installed usp with its compiled extension."""
    # what a build has left beside the sources is no installation: a worker's path may begin there
    places = [place for place in sys.path if place and Path(place).resolve() != ROOT]
    installed = next(iter(metadata.distributions(name="usp", path=places)), None)
    if installed is None:
        pytest.skip("usp runs from its sources here, it is not installed")
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    editable = origin.get("dir_info", {}).get("editable", False)
    expected = ROOT / "usp" if editable else Path(str(installed.locate_file("usp")))
    assert Path(usp.__file__).parent == expected.resolve(), sys.path
    assert (expected / "py.typed").is_file()


# -- with what is there


@pytest.mark.parametrize(
    ("versions", "enough"),
    [
        ({"setuptools": "77.0.3", "ninja": "1.13.0"}, True),
        ({"setuptools": "76.1", "ninja": "1.13.0"}, False),
        ({"setuptools": "80"}, False),
        ({}, False),
    ],
)
def test_a_build_uses_the_tools_that_are_there(
    tmp_path: Path, versions: dict[str, str], enough: bool
) -> None:
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name, version in versions.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    assert setup_env.has_build_tools(tmp_path) is enough


# -- which torch


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", (2, 13, 0)), ("2.9.1", (2, 9, 1)), ("2.10.0a0+git1", (2, 10, 0)), ("x", ())],
)
def test_release(version: str, numbers: tuple[int, ...]) -> None:
    assert torch_install.release(version) == numbers


def test_installed_torch_is_the_nearest_one_that_serves(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    old = fake_torch(tmp_path / "old", "2.9.1")  # as text, "2.9.1" > "2.10": a trap
    bare = fake_torch(tmp_path / "bare", "2.13.0", headers=False)
    good = fake_torch(tmp_path / "good", "2.10.0+cu130")
    other = fake_torch(tmp_path / "other", "2.13.0+cpu")
    found = torch_install.installed_torch([empty, old, bare, good, other])
    assert found == torch_install.TorchInstall(good / "torch", "2.10.0+cu130")
    assert torch_install.installed_torch([empty, old, bare]) is None


def test_the_build_finds_the_torch_beside_it_and_asks_for_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("USP_BUILD", raising=False)
    found = torch_install.installed_torch()
    assert found is not None
    assert found.version == metadata.version("torch")
    assert found.folder.samefile(Path(torch.__file__).parent)
    assert hooks.torch_requirement() == []


def test_the_build_asks_for_torch_only_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("USP_BUILD", raising=False)
    monkeypatch.setattr(hooks, "installed_torch", lambda: None)
    assert hooks.torch_requirement() == ["torch>=2.10"]
    monkeypatch.setenv("USP_BUILD", "none")  # nothing is compiled: no headers needed
    assert hooks.torch_requirement() == []


LISTING = """torch (2.15.0)
Available versions: 2.15.0, 2.14.1, 2.11.0+cpu, 2.13.0, 2.13.0+cpu, 2.9.1+cpu
  INSTALLED: 2.8.0
"""


def test_cpu_builds_are_those_new_enough_newest_first() -> None:
    assert setup_env.cpu_builds(LISTING) == ["2.13.0+cpu", "2.11.0+cpu"]
    assert setup_env.cpu_builds("ERROR: No matching distribution found for torch") == []


@pytest.mark.parametrize(
    ("platform", "gpu", "listing", "wanted"),
    [
        ("linux", False, LISTING, "torch==2.13.0+cpu"),
        ("linux", False, "Available versions: 2.15.0, 2.9.1+cpu", "torch>=2.10"),
        ("linux", True, LISTING, "torch>=2.10"),
        ("darwin", False, LISTING, "torch>=2.10"),
    ],
)
def test_choose_torch(
    monkeypatch: pytest.MonkeyPatch, platform: str, gpu: bool, listing: str, wanted: str
) -> None:
    listed = subprocess.CompletedProcess([], 0, stdout=listing)
    monkeypatch.setattr(setup_env.subprocess, "run", lambda *_, **__: listed)
    monkeypatch.setattr(setup_env.sys, "platform", platform)
    monkeypatch.setattr(setup_env, "has_gpu", lambda: gpu)
    assert setup_env.choose_torch(Path("python")) == wanted


def test_an_installed_torch_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(tmp_path / "lib" / "python3.11" / "site-packages", "2.10.0+cu130")
    monkeypatch.setattr(setup_env, "run_pip", lambda *_: pytest.fail("pip was called"))
    assert setup_env.ensure_torch(Path("python"), tmp_path) == "2.10.0+cu130"


# -- what is built


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchains, "gpu_present", lambda kind: False)


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(
    ("value", "names", "explicit"),
    [
        (None, ("cpu",), False),
        ("", ("cpu",), False),
        ("cpu", ("cpu",), True),
        ("cuda", ("cpu", "cuda"), True),
        ("hip", ("cpu", "hip"), True),
        ("none", (), True),
    ],
)
def test_targets(value: str | None, names: tuple[str, ...], explicit: bool) -> None:
    environ = {} if value is None else {"USP_BUILD": value}
    chosen = targets.choose(environ)
    assert chosen == targets.Targets(names, explicit)
    assert chosen.attempts == (names,)


@pytest.mark.parametrize("kind", ["cuda", "hip"])
def test_a_gpu_that_is_there_is_compiled_for_if_it_can_be(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchains, "gpu_present", lambda asked: asked == kind)
    chosen = targets.choose({})
    assert chosen == targets.Targets(("cpu", kind), explicit=False)
    assert chosen.attempts == (("cpu", kind), ("cpu",))
    assert targets.choose({"USP_BUILD": "cpu"}).names == ("cpu",)


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(targets.BuildRefused, match=r"'gpu' is not one of cpu, cuda, hip, none"):
        targets.choose({"USP_BUILD": "gpu"})


def test_the_ops_are_compiled_for_the_stable_abi_and_the_kernels_without_torch() -> None:
    found = torch_install.TorchInstall(Path("/site/torch"), "2.13.0")
    device = toolchains.Toolchain("cuda", ("nvcc",), "nvcc 0", ("sm_80",), (), ("-lcudart",))
    library = native.ops_library(ROOT, found, device)
    assert library.link_flags == ("-L/site/torch/lib", "-ltorch_cpu", "-lcudart")
    without = native.ops_library(ROOT, found)
    assert not [unit for unit in without.units if "gpu" in str(unit.source.relative_to(ROOT))]
    flags = {unit.source.name: unit.flags for unit in library.units}
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in flags["ops.cpp"]
    kernels = [unit for unit in library.units if unit.source.parent.name in ("cpu", "gpu")]
    assert {unit.source.parent.name for unit in kernels} == {"cpu", "gpu"}
    assert not any("torch" in flag for unit in kernels for flag in unit.flags)
    assert all((unit.device is device) == (unit.source.suffix == ".cu") for unit in library.units)


def test_ninja_runs_in_folders_with_spaces(tmp_path: Path) -> None:
    root, out = tmp_path / "a b$c:d", tmp_path / "o ut"
    (root / "csrc").mkdir(parents=True)
    (root / "csrc" / "f.cpp").write_text('extern "C" int f() { return VALUE; }\n')
    unit = native.Unit(root / "csrc" / "f.cpp", ('-DVALUE=sizeof("$x y")',))
    library = native.Library("f.so", (unit,))
    native.compile_libraries(root, native.find_compiler(), [library], root / "build", out)
    assert (out / "f.so").is_file()


def test_objects_of_a_copy_of_the_sources_are_used_while_they_are_up_to_date(
    tmp_path: Path,
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "csrc").mkdir(parents=True)
    (first / "csrc" / "f.h").write_text("inline int g() { return 1; }\n")
    (first / "csrc" / "f.cpp").write_text('#include "f.h"\nint f() { return g(); }\n')

    def made(root: Path) -> int:
        library = native.Library("f.so", (native.Unit(root / "csrc" / "f.cpp"),))
        objects, out = root / "build" / "objects", root / "out"
        native.compile_libraries(root, native.find_compiler(), [library], objects, out)
        assert (out / "f.so").is_file()
        return (objects / "f" / "csrc" / "f.o").stat().st_mtime_ns

    made_first = made(first)
    shutil.copytree(first / "csrc", second / "csrc")
    native.start_from(first / "build" / "objects", second / "build" / "objects")
    assert made(second) == made_first
    (second / "csrc" / "f.h").write_text("inline int g() { return 2; }\n")
    assert made(second) > made_first
    (second / "csrc" / "f.h").unlink()
    with pytest.raises(native.BuildFailed):
        made(second)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("sources"))


def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(
    sources: Path, tmp_path: Path
) -> None:
    done = build_wheel(sources, tmp_path, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "NOT built: no C++ compiler found (looked for no-such-compiler)" in done.stderr
    name, wheel = open_wheel(tmp_path)
    assert name.startswith(f"usp-{VERSION}-py3-none-")
    names = wheel.namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert "no-such-compiler" in json.loads(wheel.read("usp/_build.json"))["reason"]
    assert {"usp/__init__.py", "usp/py.typed"} <= set(names)
    assert not [name for name in names if re.match(r"(csrc|tests|build_backend)/", name)]


def test_a_compiler_that_fails_is_no_error_unless_asked_for(sources: Path, tmp_path: Path) -> None:
    done = build_wheel(sources, tmp_path, CXX="false")
    assert done.returncode == 0, done.stderr
    assert "NOT built: the compiler refused csrc/" in done.stderr
    asked = build_wheel(sources, tmp_path / "asked", CXX="false", USP_BUILD="cpu")
    assert asked.returncode != 0
    assert "USP_BUILD=cpu failed: the compiler refused csrc/" in asked.stderr
    assert "Traceback" not in asked.stderr


def test_a_gpu_without_its_compiler_is_left_out_and_said(sources: Path, tmp_path: Path) -> None:
    """Where nothing was asked for by name: first without the GPU kernels, then in pure Python."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\nexit 0\n")
    smi.chmod(0o755)
    path = f"{smi.parent}:{os.environ['PATH']}"
    environ = {"PATH": path, "CUDA_HOME": str(tmp_path / "gone"), "CXX": "false"}
    done = build_wheel(sources, tmp_path, **environ)
    assert done.returncode == 0, done.stderr
    assert f"the cuda kernels were NOT built: CUDA_HOME={tmp_path}/gone, but there" in done.stderr
    assert "the compiled extension was NOT built: the compiler refused csrc/" in done.stderr
    record = json.loads(open_wheel(tmp_path)[1].read("usp/_build.json"))
    assert record["targets"] == []
    assert record["reason"].startswith("the compiler refused csrc/")
    assert record["left_out"]["cuda"].startswith("CUDA_HOME=")
    asked = build_wheel(sources, tmp_path / "asked", **environ, USP_BUILD="cuda")
    assert asked.returncode != 0
    assert f"USP_BUILD=cuda failed: CUDA_HOME={tmp_path}/gone, but there is no" in asked.stderr
    assert "Traceback" not in asked.stderr


def test_none_builds_a_wheel_for_every_platform(sources: Path, tmp_path: Path) -> None:
    done = build_wheel(sources, tmp_path, USP_BUILD="none")
    assert done.returncode == 0, done.stderr
    name, wheel = open_wheel(tmp_path)
    assert name == f"usp-{VERSION}-py3-none-any.whl"
    assert not [name for name in wheel.namelist() if name.endswith((".so", "_build.json"))]
    held = {name for name in wheel.namelist() if name.startswith("usp/") and name.endswith(".py")}
    assert held == {str(path.relative_to(ROOT)) for path in (ROOT / "usp").rglob("*.py")}
