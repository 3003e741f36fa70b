"""Finds the device compilers, CUDA's and HIP's, and how each is to be called."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS = ("cuda", "hip")
# The kernels need bf16 matrix instructions: compute capability 8.0, or MFMA of the CDNA 2 family.
OLDEST_CUDA = (8, 0)
CUDA_DEFAULT = "8.0;9.0+PTX"
HIP_KNOWN = ("gfx90a", "gfx942")
OLDEST_NVCC = (12, 0)  # C++20
COMMON = ("-std=c++20", "-O3")
# What decides which compiler is taken and what it compiles for.
VARIABLES = (
    *("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"),
    *("ROCM_PATH", "HIPCXX", "PYTORCH_ROCM_ARCH", "HCC_AMDGPU_TARGET"),
)


class Missing(Exception):
    """A device compiler, or a part of it, is not there; the message says what to install."""


@dataclass(frozen=True)
class Toolchain:
    """One device compiler.

    Attributes:
        kind: "cuda" or "hip".
        command: The compiler.
        version: For people, e.g. "nvcc 13.0.88".
        architectures: What the objects hold, e.g. ("sm_80", "sm_90", "compute_90").
        flags: Of every device file.
        link_flags: For the library that the objects end in, linked by the C++ compiler.
    """

    kind: str
    command: tuple[str, ...]
    version: str
    architectures: tuple[str, ...]
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]


def gpu_present(kind: str, devices: Path = Path("/dev")) -> bool:
    """Whether this machine has a GPU of that kind, as far as one can tell without its libraries."""
    if kind == "hip":
        return (devices / "kfd").exists()
    if (devices / "nvidia0").exists():
        return True
    smi = shutil.which("nvidia-smi")
    return smi is not None and _succeeds([smi, "-L"])


def find(kind: str, environ: Mapping[str, str] = os.environ) -> Toolchain:
    """The device compiler of that kind.

    Args:
        kind: "cuda" or "hip".
        environ: Where CUDA_HOME, ROCM_PATH and the other variables are read.

    Raises:
        Missing: it is not there or cannot serve; the message says what to install or set.
    """
    return _find_cuda(environ) if kind == "cuda" else _find_hip(environ)


# -- CUDA


def cuda_architectures(listed: str) -> tuple[str, ...]:
    """What to compile for a list as in TORCH_CUDA_ARCH_LIST, e.g. "8.0;9.0+PTX".

    Entries older than 8.0, which such lists are full of, are left out.

    Raises:
        Missing: an entry is not a number, or none is left.
    """
    found: list[str] = []
    for entry in filter(None, re.split(r"[;,\s]+", listed)):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise Missing(
                f"TORCH_CUDA_ARCH_LIST={listed!r}: {entry!r} is not like 8.0, 9.0a or 9.0+PTX"
            )
        major, minor, suffix, ptx = match.groups()
        if (int(major), int(minor)) < OLDEST_CUDA:
            continue
        found.append(f"sm_{major}{minor}{suffix}")
        if ptx:
            found.append(f"compute_{major}{minor}")
    if not found:
        raise Missing(f"TORCH_CUDA_ARCH_LIST={listed!r} holds nothing of 8.0 or newer")
    return tuple(dict.fromkeys(found))


def _find_cuda(environ: Mapping[str, str]) -> Toolchain:
    nvcc = str(_find_nvcc(environ))
    text = _output([nvcc, "--version"])
    match = re.search(r"V(\d+)\.(\d+)\.(\d+)", text)
    version = match.group()[1:] if match else "of unknown version"
    if match and (int(match[1]), int(match[2])) < OLDEST_NVCC:
        raise Missing(
            f"{nvcc} is {version}; usp needs {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer for C++20"
        )
    architectures = cuda_architectures(environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_DEFAULT)
    flags = [*COMMON, "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "--expt-relaxed-constexpr"]
    flags += [f"-gencode={_generate_code(name)}" for name in architectures]
    return Toolchain(
        kind="cuda",
        command=(nvcc,),
        version=f"nvcc {version}",
        architectures=architectures,
        flags=tuple(flags),
        # Static: the library then loads beside any torch, and shares its context all the same.
        link_flags=(*_cuda_library_folders(nvcc), "-lcudart_static", "-ldl", "-lrt", "-lpthread"),
    )


def _generate_code(name: str) -> str:
    compute = name.replace("sm_", "compute_")
    return f"arch={compute},code={name}"


def _find_nvcc(environ: Mapping[str, str]) -> Path:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            nvcc = Path(environ[variable], "bin", "nvcc")
            if nvcc.is_file():
                return nvcc
            raise Missing(f"{variable}={environ[variable]}, but there is no {nvcc}")
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    installed = sorted(Path("/usr/local").glob("cuda-*/bin/nvcc"), key=_numbers, reverse=True)
    for found in [on_path, Path("/usr/local/cuda/bin/nvcc"), *installed]:
        if found is not None and Path(found).is_file():
            return Path(found)
    raise Missing(
        "nvcc is not on the PATH nor in /usr/local/cuda: install the CUDA toolkit (nvcc and cudart "
        "are enough, no GPU is needed), or set CUDA_HOME to its folder"
    )


def _cuda_library_folders(nvcc: str) -> list[str]:
    """The -L flags that nvcc itself would use, wherever its toolkit lies."""
    text = _output([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull])
    match = re.search(r"^#\$ LIBRARIES=(.*)$", text, re.MULTILINE)
    return [os.path.normpath(flag) for flag in shlex.split(match[1])] if match else []


# -- HIP


def hip_architectures(listed: str) -> tuple[str, ...]:
    """What to compile for a list as in PYTORCH_ROCM_ARCH, e.g. "gfx90a;gfx942".

    GPUs without the matrix instructions that the kernels use, which such lists are full of, are
    left out.

    Raises:
        Missing: none is left.
    """
    entries = filter(None, re.split(r"[;,\s]+", listed))
    found = [entry for entry in entries if entry.partition(":")[0] in HIP_KNOWN]
    if not found:
        raise Missing(f"PYTORCH_ROCM_ARCH={listed!r} holds none of {', '.join(HIP_KNOWN)}")
    return tuple(dict.fromkeys(found))


def _find_hip(environ: Mapping[str, str]) -> Toolchain:
    rocm = Path(environ.get("ROCM_PATH") or ("/opt/rocm" if Path("/opt/rocm").is_dir() else "/usr"))
    listed = environ.get("PYTORCH_ROCM_ARCH") or environ.get("HCC_AMDGPU_TARGET")
    wanted = hip_architectures(listed or ";".join(HIP_KNOWN))
    command, able = _find_hip_compiler(rocm, wanted, environ)
    if listed and able != wanted:
        lacking = ", ".join(sorted(set(wanted) - set(able)))
        raise Missing(f"{command[-1]} cannot compile for {lacking}: a newer one is needed")
    # The kernels use the compiler's builtins alone: neither HIP's headers nor its device functions,
    # which older releases do not have for every GPU.
    flags = [*COMMON, "-x", "hip", "-nogpuinc", "-nogpulib"]
    flags += ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += [f"--offload-arch={name}" for name in able]
    folders = [] if rocm == Path("/usr") else [rocm / "lib"]
    return Toolchain(
        kind="hip",
        command=command,
        version=(_output([*command, "--version"]).splitlines() or [command[-1]])[0],
        architectures=able,
        flags=tuple(flags),
        link_flags=(*(f"-L{folder}" for folder in folders), "-lamdhip64"),
    )


def command_of(named: str) -> list[str]:
    """Of a variable: a program, which may lie in a folder with spaces, or a command of words."""
    return [named] if shutil.which(named) else shlex.split(named)


def _hip_compilers(rocm: Path, environ: Mapping[str, str]) -> list[tuple[str, ...]]:
    named = environ.get("HIPCXX")
    if named:  # a clang, as CMake wants it too: hipcc takes nvcc where it finds one
        return [tuple(command_of(named))]
    folders = [rocm / "llvm" / "bin", rocm / "lib" / "llvm" / "bin"]
    found = [folder / "clang++" for folder in folders]
    names = ["amdclang++", *(f"clang++-{number}" for number in range(29, 14, -1)), "clang++"]
    on_path = [shutil.which(name, path=environ.get("PATH")) for name in names]
    found += [Path(path) for path in on_path if path]
    return [(str(path),) for path in dict.fromkeys(found) if path.is_file()]


def _find_hip_compiler(
    rocm: Path, wanted: Sequence[str], environ: Mapping[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The first compiler that serves, and which of the wanted architectures it knows."""
    against = []
    for command in _hip_compilers(rocm, environ):
        able = tuple(name for name in wanted if _knows(command, name))
        tools = [name for name in ("clang-offload-bundler", "lld") if not _has(command, name)]
        if able and not tools:
            return command, able
        reason = f"lacks {' and '.join(tools)}" if able else f"knows none of {', '.join(wanted)}"
        against.append(f"{command[-1]} {reason}")
    raise Missing(
        f"no compiler for HIP ({'; '.join(against) or 'no clang++ found'}): install ROCm and set "
        "ROCM_PATH, or on Debian: apt-get install clang-19 clang-tools-19 lld-19 libamdhip64-dev"
    )


def _knows(command: Sequence[str], architecture: str) -> bool:
    cpu = f"-mcpu={architecture}"
    nothing = ["-nogpulib", "-x", "c", os.devnull, "-c", "-o", os.devnull]
    return _succeeds([*command, "--target=amdgcn-amd-amdhsa", cpu, *nothing])


def _has(command: Sequence[str], program: str) -> bool:
    """Whether a clang finds one of the programs that it calls."""
    return Path(_output([*command, f"-print-prog-name={program}"]).strip()).is_absolute()


# -- processes


def _numbers(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(path))]


def _output(command: Sequence[str]) -> str:
    """What a program printed, on either stream; empty if it cannot be run."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout


def _succeeds(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
