"""PEP 517 / PEP 660 hooks: setuptools' own, beside the torch that is already installed."""

from __future__ import annotations

import shutil
from typing import Any

from setuptools import build_meta as _setuptools
from setuptools.build_meta import (  # the hooks that need no change
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from .command import RECORD
from .targets import ROOT, choose
from .torch_install import REQUIREMENT, installed_torch

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any] | None


def torch_requirement() -> list[str]:
    """torch's headers are needed to compile; ask for torch only where there is none to be read."""
    return [REQUIREMENT] if choose().names and installed_torch() is None else []


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*_setuptools.get_requires_for_build_wheel(config_settings), *torch_requirement()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*_setuptools.get_requires_for_build_editable(config_settings), *torch_requirement()]


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    # setuptools packs whatever an earlier build left in build/lib, deleted modules included.
    for leftover in [*ROOT.glob("build/lib*"), *ROOT.glob("build/bdist.*")]:
        shutil.rmtree(leftover)
    return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    # A build that ends in pure Python must not leave the last one's libraries in the tree.
    for leftover in [ROOT / "usp" / "_ops.so", ROOT / "usp" / RECORD]:
        leftover.unlink(missing_ok=True)
    return _setuptools.build_editable(wheel_directory, config_settings, metadata_directory)
