"""Kernels of the Hugging Face hub (``kernels``), which somebody has asked for by name.

They are code that is fetched from elsewhere. So "auto" never takes one, and none is downloaded
unless the caller says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from usp.backends.library import flash2, flash3
from usp.backends.library.backend import LibraryBackend
from usp.backends.library.call import Kernel, Missing, is_there
from usp.backends.library.record import Record, equal_dims

_INSTALL = "pip install kernels"


class HubBackends:
    """Those that were asked for, by the name of their repository."""

    def __init__(self) -> None:
        self._by_name: dict[str, LibraryBackend] = {}

    def __iter__(self) -> Iterator[LibraryBackend]:
        return iter(self._by_name.values())

    def use(
        self,
        repository: str,
        *,
        version: int | None = None,
        revision: str | None = None,
        download: bool = False,
        device_type: str = "cuda",
    ) -> str:
        """Load a kernel; see ``usp.use_kernel``."""
        _check(repository, version, revision)

        def load() -> Kernel:
            module = _kernel(repository, version, revision, download, device_type)
            return _of_convention(*_functions(module, repository))

        backend = LibraryBackend((_record(repository, load, device_type),))
        reason = backend.unavailable()
        if reason is not None:
            raise NotImplementedError(f"{repository} cannot be used here: {reason}")
        self._by_name[repository] = backend
        return repository


def _check(repository: object, version: object, revision: object) -> None:
    if not isinstance(repository, str) or repository.count("/") != 1:
        raise ValueError(f"a repository of the hub is 'owner/name', got {repository!r}")
    if (version is None) == (revision is None):
        raise ValueError(
            f"give either version= or revision= of {repository}, got version={version!r}, "
            f"revision={revision!r}: without one, what runs would change by itself"
        )


def _record(repository: str, load: Any, device_type: str) -> Record:
    """What flash-attn 2 and 3 have in common on NVIDIA's GPUs; elsewhere the least of it."""
    on_cuda = device_type == "cuda" and torch.version.cuda is not None
    return Record(
        name=repository,
        title=repository,
        missing=missing,
        load=load,
        architectures=(r"sm_\d+", r"gfx\w+"),
        dims=equal_dims(8, 256),
        device_type=device_type,
        windows=on_cuda,
        softcap=on_cuda,
        packed="hn",
        shown="the loader and a kernel made on disk",
    )


def missing() -> str | None:
    return None if is_there("kernels") else f"kernels is not installed: {_INSTALL}"


def _kernel(
    repository: str, version: int | None, revision: str | None, download: bool, device_type: str
) -> ModuleType:
    import kernels

    which = {"revision": revision} if version is None else {"version": version}
    backend = {"backend": "cpu"} if device_type == "cpu" else {}
    if download:
        return kernels.get_kernel(repository, **which, **backend)
    with _offline():
        try:
            return kernels.get_kernel(repository, **which, **backend)
        except Exception as error:
            raise Missing(f"{error} (download=True fetches it)") from error


@contextmanager
def _offline() -> Iterator[None]:
    """In here the hub's library looks at this machine alone."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _functions(module: ModuleType, repository: str) -> tuple[Any, str]:
    """The module that holds the private functions: where the public one comes from."""
    if hasattr(module, flash2.NAMES[0]):
        return module, repository
    public = getattr(module, "flash_attn_func", None)
    if public is None:
        raise Missing(f"{repository} has no flash_attn_func: it is not in flash-attn's convention")
    return sys.modules[public.__module__], f"{repository} ({public.__module__})"


def _of_convention(functions: Any, where: str) -> Kernel:
    """flash-attn 3 takes packed sequences by the functions that take others."""
    if hasattr(functions, flash2.NAMES[0]) and not hasattr(functions, flash2.PACKED_NAMES[0]):
        return flash3.of_functions(functions, where)
    return flash2.checked(functions, where)
