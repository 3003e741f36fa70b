#!/usr/bin/env python3
"""Build the sdist, from it the wheel, and make the wheel one for any Linux with a new enough libc.

Kernels are those of USP_BUILD, default cpu; wheels with GPU kernels go to folders of their own, as
their name is the same. A wheel serves every Python, and every torch from 2.10 on: it is linked to
torch's stable ABI alone, which is checked.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import check_dist
import setup_env

ROOT = Path(__file__).resolve().parents[1]
# Of the torch, or of the driver, that will be there.
NOT_OURS = ("libtorch*.so*", "libc10*.so*", "libamdhip64.so*")
# Every op, forward and backward on meshes, the command line, and that this is the installed usp.
TESTS = (
    "tests/ops",
    "tests/contract/test_native_ops.py",
    "tests/contract/test_native_refusals.py",
    "tests/sharding/test_gradients.py",
    "tests/cli/test_cli.py",
    "tests/build_backend/test_packaging.py::test_installed_metadata",
    "tests/build_backend/test_packaging.py::test_the_installed_package_is_what_is_tested",
)
UNSTABLE = ("_ZN2at", "_ZN3c10", "_ZNK2at", "_ZNK3c10", "_ZN5torch", "_ZNK5torch")


def call(command: list[str], **environ: str) -> None:
    """Run a program here; ends with its output where it fails."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nfailed: {' '.join(command)}")


def unstable_symbols(library: Path) -> list[str]:
    """What a library wants of torch's C++ interface, which other torches need not have."""
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    with library.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".dynsym")
        assert isinstance(table, SymbolTableSection)
        wanted = (s.name for s in table.iter_symbols() if s["st_shndx"] == "SHN_UNDEF")
        return [name for name in wanted if name.startswith(UNSTABLE)]


def build(venv: Path, environ: Mapping[str, str], out: Path) -> Path:
    """The wheel for any Linux, checked, in ``out`` beside the sdist that it was made from."""
    python = str(venv / "bin" / "python")
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name)
        call([python, "-m", "build", "--no-isolation", "--outdir", name, "."], **environ)
        sdist, wheel = check_dist.one(raw, "*.tar.gz"), check_dist.one(raw, "*.whl")
        check_dist.check_sdist(sdist)
        check_dist.check_wheel(wheel, Path(python))
        with zipfile.ZipFile(wheel) as archive:
            unstable = unstable_symbols(Path(archive.extract("usp/_ops.so", raw)))
        if unstable:
            raise SystemExit(f"{wheel.name} is tied to one torch: it wants {', '.join(unstable)}")
        repaired = raw / "repaired"
        excluded = [option for pattern in NOT_OURS for option in ("--exclude", pattern)]
        repair = [python, "-m", "auditwheel", "repair", *excluded, "-w", str(repaired), str(wheel)]
        call(repair, PATH=os.pathsep.join((str(venv / "bin"), os.environ["PATH"])))
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("usp-*"):
            old.unlink()
        shutil.copy(sdist, out)
        return Path(shutil.copy(check_dist.one(repaired, "*.whl"), out))


def try_it(wheel: Path, python: str, torch: str | None) -> int:
    """Install a wheel into an environment that holds nothing else, and test it; pytest's exit code.

    Args:
        python: The interpreter to make the environment of.
        torch: Which version to install; by default what ``make test`` would.
    """
    with tempfile.TemporaryDirectory(prefix="usp-wheel-") as folder:
        venv = Path(folder, "venv")
        call([python, "-m", "venv", str(venv)])
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "-q"]
        call([*pip, f"torch=={torch}" if torch else setup_env.choose_torch(Path(pip[0]))])
        call([*pip, f"{wheel}[test,bench,completions]"])
        call([str(venv / "bin" / "usp"), "info"])
        pytest = [str(venv / "bin" / "pytest"), "-q", "-p", "no:cacheprovider"]
        options = ["-m", "not gpu and not device_code and not library and not long"]
        return subprocess.run([*pytest, *options, *TESTS], cwd=ROOT, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="holds the extra dev")
    parser.add_argument("--out", type=Path, help="default: dist, or dist/cuda, dist/hip")
    parser.add_argument("--test", action="store_true", help="test it in a bare environment")
    parser.add_argument("--wheel", type=Path, help="test this one instead of building")
    parser.add_argument("--python", default=sys.executable, help="to test it with")
    parser.add_argument("--torch", help="version to test it with")
    arguments = parser.parse_args()
    kind = os.environ.get("USP_BUILD") or "cpu"
    out = arguments.out or ROOT / "dist" / ("" if kind == "cpu" else kind)
    wheel = arguments.wheel
    if wheel is None:
        wheel = build(arguments.venv.absolute(), {"USP_BUILD": kind}, out)
        for file in sorted(out.glob("usp*")):
            print(f"[usp] {file} ({file.stat().st_size / 1e6:.2f} MB)")
    if arguments.test or arguments.wheel is not None:
        return try_it(wheel.absolute(), arguments.python, arguments.torch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
