"""Wheels built as pip would have them built, from a copy of the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from places import ROOT


def copy_sources(folder: Path) -> Path:
    """The sources without anything that was built of them."""
    copy = folder / "usp"
    copy.mkdir(parents=True)
    built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.egg-info")
    for name in ("usp", "csrc", "build_backend"):
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def build_wheel(
    sources: Path, out: Path, timeout_s: float = 240, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Call the build backend's hook, in a process of its own."""
    code = f"from usp_build import hooks; print(hooks.build_wheel({str(out)!r}))"
    path = {"PYTHONPATH": str(sources / "build_backend")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=sources,
        env={**os.environ, "USP_BUILD": "", **path, **environ},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def open_wheel(out: Path) -> tuple[str, zipfile.ZipFile]:
    """Name and contents of the one wheel in a folder."""
    (wheel,) = out.glob("*.whl")
    return wheel.name, zipfile.ZipFile(wheel)
