"""One real wheel for each device kind in a run of the tests, and what its compilers left behind."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from background import Said, environment
from device_code import ASK_CLANG, ASK_NVCC, Kernel, cuda_kernels, hip_kernels
from usp_build import toolchains
from wheels import build_wheel, copy_sources, open_wheel

BUILD_TIMEOUT_S = 1500


@dataclass(frozen=True)
class Built:
    """A wheel of one device kind, unpacked.

    Attributes:
        folder: What ``import usp`` finds when it comes first on the path.
        kernels: Everything compiled for the GPU.
        log: What the build printed.
        kept: Where nvcc's intermediate files are, PTX among them.
        sources: Where it was built, with clang's assembly.
    """

    kind: str
    folder: Path
    kernels: tuple[Kernel, ...]
    log: str
    kept: Path
    sources: Path

    def assembly(self, target: str) -> list[Path]:
        """What clang made of every source file, for gfx90a or gfx942."""
        return sorted(self.sources.rglob(f"*-hip-amdgcn-amd-amdhsa-{target}.s"))

    def ptx(self, source: str, architecture: str) -> Path:
        """What nvcc made of a source file, for sm_80 or sm_90."""
        return self.kept / f"{source}.{architecture.replace('sm_', 'compute_')}.ptx"


class Builds:
    """What ``main`` has made, once it has."""

    def __init__(self, wait: Callable[[], Said]) -> None:
        self._wait = wait

    def of(self, kind: str) -> Built:
        """The test is skipped where there is no compiler for ``kind``."""
        try:
            toolchains.find(kind)
        except toolchains.Missing as missing:
            pytest.skip(f"no compiler for {kind}: {missing}")
        said = self._wait()
        assert said.code == 0, said.out[-8000:] + said.err[-2000:]
        return read(kind, folder() / kind)


@cache
def folder() -> Path:
    made = tempfile.mkdtemp(prefix="usp-gpu-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def command() -> tuple[list[str], dict[str, str]]:
    """Makes the builds, for ``background.py``."""
    return [sys.executable, __file__, str(folder())], environment()


def main() -> None:
    """Every kind that there is a compiler for; what is compiled for the CPU is compiled once."""
    into = Path(sys.argv[1])
    sources = copy_sources(into)
    for kind in toolchains.KINDS:
        with suppress(toolchains.Missing):
            toolchains.find(kind)
            build(kind, sources, into / kind)


def build(kind: str, sources: Path, out: Path) -> None:
    kept = out / "kept"
    kept.mkdir(parents=True)
    ask = {"NVCC_APPEND_FLAGS": f"{ASK_NVCC}{kept}", "CCC_OVERRIDE_OPTIONS": ASK_CLANG}
    # Without the PTX for newer GPUs, which is the code of sm_90 once more.
    ask |= {"TORCH_CUDA_ARCH_LIST": "8.0;9.0", "PYTORCH_ROCM_ARCH": "gfx90a;gfx942"}
    done = build_wheel(sources, out, BUILD_TIMEOUT_S, USP_BUILD=kind, **ask)
    (out / "log").write_text(done.stdout)
    if done.returncode != 0:
        sys.exit(f"{kind}: {done.stdout[-8000:]}{done.stderr[-2000:]}")
    open_wheel(out)[1].extractall(out / "unpacked")


@cache
def read(kind: str, out: Path) -> Built:
    log, kept, sources = (out / "log").read_text(), out / "kept", out.parent / "usp"
    if kind == "cuda":
        kernels = cuda_kernels(log, kept)
    else:
        kernels = hip_kernels(sources.rglob("*-hip-amdgcn-amd-amdhsa-gfx*.s"))
    return Built(kind, out / "unpacked", tuple(kernels), log, kept, sources)


if __name__ == "__main__":
    main()
