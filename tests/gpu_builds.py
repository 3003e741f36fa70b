"""One real wheel for each device kind in a run of the tests, and what its compilers left behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
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
        """What nvcc made of a source file, for sm_80 or sm_90a."""
        return self.kept / f"{source}.{architecture.replace('sm_', 'compute_')}.ptx"


class Builds:
    """Makes each build when it is first wanted; what is compiled for the CPU is compiled once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sources: Path | None = None
        self._built: dict[str, Built] = {}

    def of(self, kind: str) -> Built:
        """The test is skipped where there is no compiler for ``kind``."""
        try:
            toolchains.find(kind)
        except toolchains.Missing as missing:
            pytest.skip(f"no compiler for {kind}: {missing}")
        if kind not in self._built:
            self._sources = self._sources or copy_sources(self._folder)
            self._built[kind] = build(kind, self._sources, self._folder / kind)
        return self._built[kind]


def build(kind: str, sources: Path, out: Path) -> Built:
    kept = out / "kept"
    kept.mkdir(parents=True)
    ask = {"NVCC_APPEND_FLAGS": f"{ASK_NVCC}{kept}", "CCC_OVERRIDE_OPTIONS": ASK_CLANG}
    # Without the PTX for newer GPUs, which is the code of sm_90a once more.
    ask |= {"TORCH_CUDA_ARCH_LIST": "8.0;9.0", "PYTORCH_ROCM_ARCH": "gfx90a;gfx942"}
    done = build_wheel(sources, out, BUILD_TIMEOUT_S, USP_BUILD=kind, **ask)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    open_wheel(out)[1].extractall(out / "unpacked")
    if kind == "cuda":
        kernels = cuda_kernels(done.stdout, kept)
    else:
        kernels = hip_kernels(sources.rglob("*-hip-amdgcn-amd-amdhsa-gfx*.s"))
    return Built(kind, out / "unpacked", tuple(kernels), done.stdout, kept, sources)
