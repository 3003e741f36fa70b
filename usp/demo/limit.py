"""A limit to the memory of a process, and what became of a step that ran into it."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# What allocators say, torch's and those of kernels.
_SIGNS = ("can't allocate memory", "bad_alloc", "out of memory", "Cannot allocate memory")


@dataclass(frozen=True)
class OutOfMemory:
    """A step that did not fit.

    Attributes:
        said: By the allocator.
        seconds: Until then.
    """

    said: str
    seconds: float


def can_limit() -> bool:
    """Whether this system holds processes to a limit of their private memory."""
    return platform.system() == "Linux"


@contextmanager
def memory_limit(size: int | None) -> Iterator[None]:
    """In here this process can take so many bytes more than it has; None is any number.

    The limit is the kernel's, RLIMIT_DATA: private writable memory, touched or not.
    """
    if size is None:
        yield
        return
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_private_memory() + size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))


class Refusal:
    """Catches what an allocator raises; ``found`` says it afterwards, None where nothing was."""

    def __init__(self) -> None:
        self.found: OutOfMemory | None = None
        self._start = time.perf_counter()

    def __enter__(self) -> Refusal:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        text = " ".join(str(error).split())
        of_memory = isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)
        if not of_memory and not isinstance(error, MemoryError):
            return False
        said = text.partition("DefaultCPUAllocator: ")[2] or text or "MemoryError"
        self.found = OutOfMemory(said[:160], time.perf_counter() - self._start)
        return True


def _private_memory() -> int:
    """Bytes that RLIMIT_DATA counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (data,) = (line.split()[1] for line in lines if line.startswith("VmData"))
    return 1024 * int(data)
