"""Memory for tables of millions of numbers, in large pages where the system has them."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

_LARGE_PAGE = 2 * 2**20


def uninitialised(*shape: int, dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the host. The system hands out fresh memory page by page as it is first
    written, which takes longer than planning does; large pages save most of that."""
    found = _large_pages(shape, dtype)
    return torch.empty(shape, dtype=dtype, device="cpu") if found is None else found


def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """``torch.zeros`` on the host; what nobody writes then takes no memory, and no time."""
    found = _large_pages(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device="cpu") if found is None else found


def _large_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Zeros in fresh ones; None where that does not pay, or the system has none."""
    size = prod(shape) * dtype.itemsize
    if 2 * size < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    whole = -(-size // _LARGE_PAGE) + 1  # else its first and last part come in small ones
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, whole * _LARGE_PAGE, flags=flags)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return None
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    begin = -memory.data_ptr() % _LARGE_PAGE
    return memory[begin : begin + size].view(dtype).view(shape)
