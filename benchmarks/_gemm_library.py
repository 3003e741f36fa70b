"""Builds and loads what cpu_gemm.py times: usp's tile kernels, and torch's brgemm by its name."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PEER = Path(__file__).with_name("gemm_peer.cpp")
PRODUCTS = ("scores", "values", "key gradients")  # enum Product of gemm_peer.cpp
# at::native::cpublas::brgemm(int64 x 6, bool, const T*, const T*, float*, bool)
BRGEMM = {
    torch.float32: "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb",
    torch.bfloat16: "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb",
}


def load_peer(optimize: str) -> ctypes.CDLL:
    """gemm_peer.cpp and the kernels as a library; built once for each state of the sources."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        sys.exit(f"no C++ compiler: {os.environ.get('CXX', 'c++')} is not there; set CXX")
    flags = [optimize, "-std=c++20", "-fPIC", f"-I{ROOT / 'csrc'}"]
    cpu = ROOT / "csrc" / "cpu"
    level = [cpu / "capability.cpp", cpu / "fastest.cpp"]
    sources = [PEER, *sorted(cpu.glob("kernels*.cpp")), *level]
    headers = sorted((ROOT / "csrc").rglob("*.h"))
    state = hashlib.sha256(" ".join([compiler, *flags]).encode())
    for file in (*sources, *headers):
        state.update(file.read_bytes())
    library = _folder() / f"{state.hexdigest()[:16]}.so"
    if not library.is_file():
        build(compiler, flags, sources, library)
    peer = ctypes.CDLL(str(library))
    declare(peer)
    return peer


def _folder() -> Path:
    """Among the sources, or where they cannot be written a temporary one."""
    if os.access(ROOT, os.W_OK):
        return ROOT / "build" / "gemm_peer"
    folder = tempfile.mkdtemp(prefix="usp-gemm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def build(compiler: str, flags: list[str], sources: list[Path], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)

    def call(*arguments: str) -> None:
        done = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{compiler} {' '.join(arguments)} failed:\n{done.stderr}")

    print(f"building {library} ...", file=sys.stderr)
    objects = [str(library.with_suffix(f".{source.stem}.o")) for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        steps = zip(sources, objects, strict=True)
        list(pool.map(lambda step: call(*flags, "-c", str(step[0]), "-o", step[1]), steps))
    part = library.with_suffix(f".{os.getpid()}.part")
    call("-shared", *objects, "-o", str(part))
    part.replace(library)  # whole or not at all
    for file in objects:
        Path(file).unlink(missing_ok=True)


def declare(peer: ctypes.CDLL) -> None:
    pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "usp_new": (pointer, [ctypes.c_int, flag, size, *[pointer, size, size] * 2]),
        "usp_columns": (size, [pointer]),
        "torch_new": (pointer, [pointer, flag, pointer, size, size, pointer, size, flag]),
        "capability": (ctypes.c_char_p, []),
        "peak_run": (ctypes.c_double, [flag, size, pointer]),
    }
    for side in ("usp", "torch"):
        signatures[f"{side}_run"] = (None, [pointer, size])
        signatures[f"{side}_clear"] = (None, [pointer])
        signatures[f"{side}_result"] = (pointer, [pointer])
        signatures[f"{side}_delete"] = (None, [pointer])
    for name, (result, arguments) in signatures.items():
        function = getattr(peer, name)
        function.restype, function.argtypes = result, arguments


def find_brgemm(dtype: torch.dtype) -> Any:
    """torch's function, or None where this torch does not export it under that name."""
    for suffix in ("so", "dylib"):
        library = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"
        if library.is_file():
            return getattr(ctypes.CDLL(str(library)), BRGEMM[dtype], None)
    return None


class Gemm:
    """A prepared product of one side: "usp" or "torch"."""

    def __init__(self, peer: ctypes.CDLL, side: str, handle: int, operands: list[Tensor]) -> None:
        self._handle, self._operands = handle, operands  # read in place
        self._run, self._clear, self._result, self._delete = (
            getattr(peer, f"{side}_{verb}") for verb in ("run", "clear", "result", "delete")
        )

    def __del__(self) -> None:
        self._delete(self._handle)

    def run(self, repeats: int) -> None:
        self._run(self._handle, repeats)

    def result(self, rows: int, columns: int) -> Tensor:
        """Of one call: (rows, columns) fp32."""
        self._clear(self._handle)
        self._run(self._handle, 1)
        memory = (ctypes.c_float * (rows * columns)).from_address(self._result(self._handle))
        return torch.frombuffer(memory, dtype=torch.float32).view(rows, columns).clone()


def of_usp(peer: ctypes.CDLL, product: str, left: Tensor, right: Tensor) -> Gemm:
    handle = peer.usp_new(
        PRODUCTS.index(product),
        left.dtype == torch.bfloat16,
        right.shape[1],
        left.data_ptr(),
        *left.shape,
        right.data_ptr(),
        *right.shape,
    )
    return Gemm(peer, "usp", handle, [left, right])


def of_torch(peer: ctypes.CDLL, a: Tensor, b: Tensor, adds: bool) -> Gemm | None:
    """None where this torch has no brgemm, or refuses these operands on this machine."""
    brgemm = find_brgemm(a.dtype)
    if brgemm is None:
        return None
    address = ctypes.cast(brgemm, ctypes.c_void_p)
    bf16 = a.dtype == torch.bfloat16
    handle = peer.torch_new(address, bf16, a.data_ptr(), *a.shape, b.data_ptr(), b.shape[1], adds)
    return Gemm(peer, "torch", handle, [a, b]) if handle else None
