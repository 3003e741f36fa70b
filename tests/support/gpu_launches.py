"""What the kernels' own host code launches, for tests that run compiled kernels themselves."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_int, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Launch:
    """A launch as a GPU's runtime is told of it.

    Attributes:
        name: The kernel's, as c++filt writes it.
        arguments: The bytes of each parameter, in order.
        grid: Blocks along x, y, z.
        threads: Of a block, all along x.
        shared_bytes: Dynamic shared memory of a block.
    """

    name: str
    arguments: tuple[bytes, ...]
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int


class _Argument(Structure):
    _fields_ = [("data", c_void_p), ("bytes", c_size_t)]


class _Launch(Structure):
    _fields_ = [
        ("kernel", c_void_p),
        ("arguments", POINTER(_Argument)),
        ("num_arguments", c_size_t),
        ("grid", c_uint32 * 3),
        ("threads", c_int),
        ("shared_bytes", c_size_t),
    ]


_Listener = ctypes.CFUNCTYPE(None, POINTER(_Launch))


def function_names(library: Path) -> dict[int, str]:
    """Demangled names by offset in the file, local functions too."""
    listed = subprocess.run(
        ["nm", "--demangle", "--defined-only", str(library)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    symbols = (line.split(" ", 2) for line in listed.splitlines())
    return {int(offset, 16): name for offset, kind, name in symbols if kind in "tTwW"}


class Launches:
    """Takes the launches of a library of the emulated GPU."""

    def __init__(self, library: ctypes.CDLL, path: Path) -> None:
        self._library = library
        self._names = function_names(path)
        known = "usp_gpu_redirect_launches"
        address = ctypes.cast(getattr(library, known), c_void_p).value
        offset = next(offset for offset, name in self._names.items() if name == known)
        assert address is not None
        self._base = address - offset

    def _read(self, told: _Launch) -> Launch:
        arguments = told.arguments[: told.num_arguments]
        return Launch(
            self._names[told.kernel - self._base],
            tuple(ctypes.string_at(argument.data, argument.bytes) for argument in arguments),
            tuple(told.grid),
            told.threads,
            told.shared_bytes,
        )

    @contextmanager
    def redirected(self, run: Callable[[Launch], None]) -> Iterator[None]:
        """Meanwhile launches go to ``run`` and not to the emulated GPU; raises what it raises."""
        errors: list[BaseException] = []

        def listen(told: object) -> None:
            try:
                if not errors:  # an op may launch several kernels
                    run(self._read(told.contents))  # type: ignore[attr-defined]
            except BaseException as error:
                errors.append(error)

        listener = _Listener(listen)
        self._library.usp_gpu_redirect_launches(listener)
        try:
            yield
        finally:
            self._library.usp_gpu_redirect_launches(_Listener())
        if errors:
            raise errors[0]
