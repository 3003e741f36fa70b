"""Compiles `csrc/` with ninja: the torch ops, on the stable ABI."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .toolchains import Toolchain, command_of
from .torch_install import TorchInstall

# Ops compiled for this version of torch's stable ABI load in it and in everything newer.
STABLE_ABI = ("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY")
COMMON = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


class BuildFailed(Exception):
    """The extension could not be compiled; the message says why."""


@dataclass(frozen=True)
class Unit:
    """One source file, the flags that only it needs, and its compiler if not the C++ one."""

    source: Path
    flags: tuple[str, ...] = ()
    device: Toolchain | None = None


@dataclass(frozen=True)
class Library:
    """One shared library: what it is called on disk, its sources, what it links."""

    filename: str
    units: tuple[Unit, ...]
    link_flags: tuple[str, ...] = ()


def find_compiler() -> list[str]:
    """The C++ compiler: `CXX`, else what Python was built with, else the usual names."""
    named = os.environ.get("CXX")
    candidates = [named] if named else [sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    for candidate in filter(None, candidates):
        command = command_of(candidate)
        if shutil.which(command[0]):
            return command
    raise BuildFailed(f"no C++ compiler found (looked for {', '.join(filter(None, candidates))})")


def compiler_version(compiler: Sequence[str]) -> str:
    """The first line of `--version`."""
    done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [" ".join(compiler)])[0]


def device_sources(root: Path) -> list[Path]:
    """The GPU kernels, the same for CUDA and HIP."""
    return sorted((root / "csrc" / "gpu").glob("*.cu"))


def ops_library(root: Path, torch: TorchInstall, device: Toolchain | None = None) -> Library:
    """The torch ops: only `csrc/torch` sees torch, the kernels are free of it."""
    csrc = root / "csrc"
    torch_flags = (*STABLE_ABI, f"-isystem{torch.include}")
    units: list[Unit] = []
    # No rpath: usp imports torch first, and the loader then knows libtorch_cpu by its name.
    link_flags = [f"-L{torch.lib}", "-ltorch_cpu"]
    if device is not None:
        # First, for they take longest.
        units += [Unit(source, device=device) for source in device_sources(root)]
        units.append(Unit(csrc / "torch" / "gpu_ops.cpp", torch_flags))
        # After torch's folder: a torch that brings its own HIP runtime must get no second one.
        link_flags += device.link_flags
    units.append(Unit(csrc / "torch" / "ops.cpp", torch_flags))
    units += [Unit(source) for source in sorted((csrc / "cpu").glob("*.cpp"))]
    return Library("_ops.so", tuple(units), tuple(link_flags))


def _quote(text: object) -> str:
    """A path as ninja wants it in a build line."""
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _command(arguments: Sequence[str]) -> str:
    """Arguments as ninja wants them in a variable that a shell will read."""
    return shlex.join(arguments).replace("$", "$$")


def _build_lines(
    root: Path, unit: Unit, compiler: Sequence[str], obj: Path, above: str
) -> list[str]:
    """How ninja makes one object; `above`: the root as seen from where ninja runs."""
    command = compiler if unit.device is None else unit.device.command
    common = COMMON if unit.device is None else unit.device.flags
    flags = [*common, f"-I{above}/csrc", *unit.flags]
    return [
        f"build {_quote(obj)}: compile {_quote(Path(above, unit.source.relative_to(root)))}",
        f"  compiler = {_command(command)}",
        f"  flags = {_command(flags)}",
    ]


def ninja_file(
    root: Path, compiler: Sequence[str], libraries: Sequence[Library], objects: Path, out: Path
) -> str:
    """The text of `build.ninja` in `objects` that puts every library into `out`."""
    # relative: root and objects may be copied together, and what is up to date stays so
    above = os.path.relpath(root.resolve(), objects.resolve())
    undefined = " -undefined dynamic_lookup" if sys.platform == "darwin" else ""
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",  # nvcc and clang take these flags too
        "  command = $compiler -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        f"  command = {_command(compiler)} -shared{undefined} $in $flags -o $out",
        "  description = link $out",
    ]
    for library in libraries:
        made = []
        for unit in library.units:
            suffix = ".o" if unit.device is None else f".{unit.device.kind}.o"
            stem = unit.source.relative_to(root).with_suffix(suffix)
            made.append(Path(library.filename.split(".")[0], stem))
            lines += _build_lines(root, unit, compiler, made[-1], above)
        lines += [
            f"build {_quote(out / library.filename)}: link {' '.join(map(_quote, made))}",
            f"  flags = {_command(library.link_flags)}",
        ]
    return "\n".join(lines) + "\n"


def find_ninja() -> str:
    """The ninja that pip installed, else the one on the PATH."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise BuildFailed("ninja is missing: pip install ninja") from None
        return found
    return str(Path(ninja.BIN_DIR, "ninja"))


def start_from(earlier: Path, objects: Path) -> None:
    """Begin with the objects of another build, of a copy of the sources, if there are any."""
    if earlier.is_dir() and not objects.exists():
        shutil.copytree(earlier, objects)  # with the times by which ninja judges them


def compile_libraries(
    root: Path, compiler: Sequence[str], libraries: Sequence[Library], objects: Path, out: Path
) -> None:
    """Compile and link `libraries` into `out`, reusing what is up to date in `objects`.

    Raises:
        BuildFailed: a source is missing, or ninja failed; its output was shown.
    """
    missing = [str(u.source) for lib in libraries for u in lib.units if not u.source.is_file()]
    if missing:
        raise BuildFailed(f"sources are missing: {', '.join(missing)}")
    objects.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    (objects / "build.ninja").write_text(ninja_file(root, compiler, libraries, objects, out))
    jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
    if subprocess.run([find_ninja(), "-C", str(objects), *jobs], check=False).returncode:
        raise BuildFailed("the compiler refused csrc/ (its messages stand above)")
