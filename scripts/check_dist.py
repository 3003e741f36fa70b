#!/usr/bin/env python3
"""Check what is about to be published: the files in sdist and wheel, and that the wheel imports.

usage: scripts/check_dist.py DIST_FOLDER VENV      (VENV holds torch; the wheel is not put into it)
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# Runs in an empty folder on the unpacked wheel alone: is it whole, and do its kernels compute?
PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, usp
assert usp.__file__.startswith(sys.argv[1]), usp.__file__
q, k, v = (torch.randn(1, 37, 4, 16, dtype=torch.float64) for _ in range(3))
native = usp.long_context_attention(q, k, v, causal=True, backend="native")
reference = usp.long_context_attention(q, k, v, causal=True, backend="reference")
torch.testing.assert_close(native, reference, rtol=0, atol=1e-9)
print("the wheel's kernels agree with the reference to", (native - reference).abs().max().item())
"""


def one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder} holds {len(found)} files {pattern}, expected 1")
    return found[0]


def expect(names: set[str], wanted: list[str], unwanted: list[str], where: Path) -> None:
    """Every `wanted` prefix occurs among `names`, and no `unwanted` one."""
    missing = [w for w in wanted if not any(name.startswith(w) for name in names)]
    surplus = [n for n in sorted(names) if n.startswith(tuple(unwanted))]
    if missing or surplus:
        raise SystemExit(f"{where.name}: missing {missing}, should not hold {surplus}")


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [
        "csrc/torch/ops.cpp",
        "csrc/common/span.h",
        "tests/test_",
        "emulators/",
        "CMakeLists.txt",
    ]
    wanted += ["build_backend/usp_build/hooks.py", "usp/py.typed", "LICENSE", "README.md"]
    expect(names, wanted, ["build/", ".venv", "usp/_ops.so"], path)


def check_wheel(path: Path, python: Path) -> None:
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        names = set(archive.namelist())
        wanted = ["usp/__init__.py", "usp/py.typed", "usp/_ops.so", "usp/_build.json"]
        expect(names, wanted, ["csrc/", "tests/", "build_backend/", "setup.py"], path)
        unpacked = Path(folder, "wheel").resolve()
        archive.extractall(unpacked)
        clean = Path(folder, "clean")
        clean.mkdir()
        subprocess.run([python, "-I", "-c", PROBE, str(unpacked)], cwd=clean, check=True)


def main() -> int:
    if len(sys.argv) != 3:
        raise SystemExit((__doc__ or "").strip())
    dist, venv = Path(sys.argv[1]), Path(sys.argv[2]).absolute()
    check_sdist(one(dist, "*.tar.gz"))
    check_wheel(one(dist, "*.whl"), venv / "bin" / "python")
    return 0


if __name__ == "__main__":
    sys.exit(main())
