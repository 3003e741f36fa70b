"""Finds the torch that usp will run beside, without importing it.

pip builds in an isolated environment that hides the packages of the environment it installs
into. The interpreter is the same, though, so its site folders can still be read: the extension
compiles against the headers of the torch that is there, and no second one is downloaded.
"""

from __future__ import annotations

import re
import site
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

MINIMUM = (2, 10)
REQUIREMENT = f"torch>={MINIMUM[0]}.{MINIMUM[1]}"


@dataclass(frozen=True)
class TorchInstall:
    """A torch package on disk: its folder and its version as published, e.g. "2.13.0+cpu"."""

    folder: Path
    version: str

    @property
    def include(self) -> Path:
        return self.folder / "include"

    @property
    def lib(self) -> Path:
        return self.folder / "lib"


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def _base_environment_is_visible() -> bool:
    config = Path(sys.prefix, "pyvenv.cfg")
    if not config.is_file():
        return True
    return bool(
        re.search(r"(?im)^\s*include-system-site-packages\s*=\s*true\s*$", config.read_text())
    )


def site_folders() -> list[Path]:
    """The folders packages of this interpreter live in, isolated or not, nearest first."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if _base_environment_is_visible():
        folders.append(site.getusersitepackages())
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        folders += [sysconfig.get_path(key, vars=base) for key in ("purelib", "platlib")]
        folders += site.getsitepackages([sys.base_prefix])
    return [Path(folder) for folder in dict.fromkeys([*folders, *sys.path]) if folder]


def installed_torch(folders: Iterable[Path] | None = None) -> TorchInstall | None:
    """The first torch new enough for usp in `folders` (default: this interpreter's), or None."""
    for folder in site_folders() if folders is None else folders:
        for found in metadata.distributions(name="torch", path=[str(folder)]):
            torch = TorchInstall(folder / "torch", found.version)
            if release(torch.version) >= MINIMUM and torch.include.is_dir():
                return torch
    return None
