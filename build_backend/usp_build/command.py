"""The setuptools command that puts the compiled extension, and a record of it, into the package."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from . import native, toolchains
from .targets import ROOT, BuildRefused, choose
from .torch_install import REQUIREMENT, installed_torch

RECORD = "_build.json"


def extensions() -> list[Extension]:
    """What setuptools needs to know: names, so that wheels carry the right tag."""
    return [Extension("usp._ops", [])] if choose().names else []


class TagForEveryPython(bdist_wheel):
    """Nothing here is compiled against Python: one wheel of a platform serves all versions."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BuildNative(build_ext):
    """Compiles with ninja instead of one file at a time, and may end in pure Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no module: torch loads it by its path

    def build_extensions(self) -> None:
        targets = choose()
        record: dict[str, Any] = {"targets": [], "reason": None, "left_out": {}}
        out = Path(self.build_lib).resolve() / "usp"
        for names in targets.attempts:
            try:
                record |= self._compile(names, out)
                print(f"usp: built {', '.join(names)} kernels with {_compilers(record)}")
                break
            except native.BuildFailed as failure:
                if targets.explicit:
                    raise BuildRefused(f"USP_BUILD={names[-1]} failed: {failure}") from None
                for kind in names[1:]:
                    record["left_out"][kind] = str(failure)
                record["reason"] = str(failure)
                _warn(names, str(failure))
        else:
            self.extensions: list[Extension] = []  # what is not there must not be copied
        folder = ROOT / "usp" if self.editable_mode else out
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def _compile(self, names: tuple[str, ...], out: Path) -> dict[str, Any]:
        """Compile for those device kinds; what there is to say about it."""
        torch = installed_torch()
        if torch is None:
            raise native.BuildFailed(f"{REQUIREMENT} is not installed, and its headers are needed")
        compiler = native.find_compiler()
        device = self._device_toolchain(names)
        libraries = [native.ops_library(ROOT, torch, device)]
        tag = f"{sysconfig.get_platform()}-torch-{torch.version}"
        objects = ROOT / "build" / f"native-{tag}"
        if earlier := os.environ.get("USP_OBJECTS"):
            native.start_from(Path(earlier, objects.name), objects)
        native.compile_libraries(ROOT, compiler, libraries, objects, out)
        record = {"targets": list(names), "reason": None, "torch": torch.version}
        record["compiler"] = native.compiler_version(compiler)
        if device is not None:
            record["device_compiler"] = device.version
            record["architectures"] = list(device.architectures)
        return record

    def _device_toolchain(self, names: tuple[str, ...]) -> toolchains.Toolchain | None:
        try:
            kinds = [kind for kind in names if kind in toolchains.KINDS]
            return toolchains.find(kinds[0]) if kinds else None
        except toolchains.Missing as missing:
            raise native.BuildFailed(str(missing)) from None


def _compilers(record: dict[str, Any]) -> str:
    if "device_compiler" not in record:
        return str(record["compiler"])
    architectures = ", ".join(record["architectures"])
    return f"{record['compiler']} and {record['device_compiler']} for {architectures}"


def _warn(names: tuple[str, ...], reason: str) -> None:
    what, instead = "the compiled extension was", "pure Python: correct, and much slower on a CPU"
    if len(names) > 1:
        what, instead = f"the {names[-1]} kernels were", "without them"
    bar = "!" * 88
    print(
        f"{bar}\nusp: {what} NOT built: {reason}\n"
        f"usp: installing {instead}.\n"
        f"usp: USP_BUILD={names[-1]} makes this an error, USP_BUILD=none makes it silent.\n{bar}",
        file=sys.stderr,
    )
