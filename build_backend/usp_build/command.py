"""The setuptools command that puts the compiled extension, and a record of it, into the package."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from . import native
from .targets import ROOT, BuildRefused, Targets, choose
from .torch_install import REQUIREMENT, installed_torch

RECORD = "_build.json"


def extensions() -> list[Extension]:
    """What setuptools needs to know: names, so that wheels carry the right tag."""
    return [Extension(f"usp.{name}", []) for name in ("_ops", "_C")] if choose().names else []


class BuildNative(build_ext):
    """Compiles with ninja instead of one file at a time, and may end in pure Python."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.split(".")[-1] == "_ops":  # no Python module: torch loads it by its path
            return str(Path("usp", "_ops.so"))
        return str(super().get_ext_filename(fullname))

    def build_extensions(self) -> None:
        targets = choose()
        record: dict[str, object] = {"targets": list(targets.names), "reason": None}
        out = Path(self.build_lib).resolve() / "usp"
        try:
            record |= self._compile(out)
            print(f"usp: built {', '.join(targets.names)} kernels with {record['compiler']}")
        except native.BuildFailed as failure:
            self._give_up(targets, str(failure))
            record |= {"targets": [], "reason": str(failure)}
        folder = ROOT / "usp" if self.editable_mode else out
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def _compile(self, out: Path) -> dict[str, object]:
        torch = installed_torch()
        if torch is None:
            raise native.BuildFailed(f"{REQUIREMENT} is not installed, and its headers are needed")
        compiler = native.find_compiler()
        libraries = [
            native.ops_library(ROOT, torch),
            native.python_module(ROOT, self.distribution.get_version()),
        ]
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch-{torch.version}"
        native.compile_libraries(ROOT, compiler, libraries, ROOT / "build" / f"native-{tag}", out)
        return {"torch": torch.version, "compiler": native.compiler_version(compiler)}

    def _give_up(self, targets: Targets, reason: str) -> None:
        if targets.explicit:
            raise BuildRefused(f"USP_BUILD={'+'.join(targets.names)} failed: {reason}")
        bar = "!" * 88
        print(
            f"{bar}\nusp: the compiled extension was NOT built: {reason}\n"
            "usp: installing pure Python, which is correct and much slower on a CPU.\n"
            f"usp: USP_BUILD=cpu makes this an error, USP_BUILD=none makes it silent.\n{bar}",
            file=sys.stderr,
        )
        self.extensions: list[Extension] = []  # what is not there must not be copied
