"""Who sees whom, as arguments of the op: what changes from batch to batch is read when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from usp.attention.masking import MaskOptions, check_mask, host_values, is_nested
from usp.planning.kinds import graph_integer, is_fake
from usp.planning.masks.bounds import host_boundaries
from usp.planning.masks.mask import Mask
from usp.planning.masks.telling import from_told, told


class ReadMasks(NamedTuple):
    """Values that are read when a graph runs, int64 on CPU; each is None where it was not given.

    Attributes:
        cu_seqlens: Boundaries of documents, of all samples one behind the other.
        cu_counts: (B,) how many of them each sample has, -1 for none, where they differ.
        key_lengths, query_offset: (B,), or () for all.
        mask_tensors: All tensors of ``mask``, flat.
    """

    cu_seqlens: Tensor | None
    cu_counts: Tensor | None
    key_lengths: Tensor | None
    query_offset: Tensor | None
    mask_tensors: Tensor | None


def read_masks(options: MaskOptions) -> tuple[ReadMasks, str | None, list[int]]:
    """What a call reads when it runs, and ``mask`` in words and numbers.

    Raises:
        TypeError, ValueError: an option is of another kind, or not on the host.
        NotImplementedError: a mask is of a class that no graph can hold.
    """
    mask = check_mask(options.mask)
    of_mask: tuple[str | None, list[int], Tensor | None] = None, [], None
    if mask is not None:
        of_mask = said(mask)
    words, numbers, tensors = of_mask
    cu_seqlens, counts = _boundaries(options.cu_seqlens)
    lengths = _values("key_lengths", options.key_lengths)
    offset: Any = options.query_offset
    offset = None if type(offset) is int and offset == 0 else _values("query_offset", offset)
    return ReadMasks(cu_seqlens, counts, lengths, offset, tensors), words, numbers


def said(mask: Mask | Sequence[Mask]) -> tuple[str, list[int], Tensor | None]:
    """Words, numbers and tensors of masks, as an op takes them.

    Raises:
        NotImplementedError: a mask is of a class that no graph can hold.
    """
    words, numbers, tensors = told(mask)
    flat = [_seen(each).reshape(-1) for each in tensors]
    return " ".join(words), numbers, torch.cat(flat) if flat else None


def mask_options(read: ReadMasks, words: str | None, numbers: Sequence[int]) -> dict[str, Any]:
    """The way back: those of the options of ``long_context_attention``."""
    given: dict[str, Any] = {
        "cu_seqlens": read.cu_seqlens,
        "key_lengths": read.key_lengths,
        "query_offset": 0 if read.query_offset is None else read.query_offset,
        "mask": None if words is None else from_told(words, numbers, read.mask_tensors),
    }
    if read.cu_counts is not None and read.cu_seqlens is not None:
        counts = read.cu_counts.tolist()
        each = read.cu_seqlens.split([max(count, 0) for count in counts])
        given["cu_seqlens"] = [
            None if count < 0 else bounds for bounds, count in zip(each, counts, strict=True)
        ]
    return given


def _boundaries(cu_seqlens: Any) -> tuple[Tensor | None, Tensor | None]:
    """Boundaries of documents, and how many each sample has."""
    if cu_seqlens is None or not is_nested(cu_seqlens):
        return _documents(cu_seqlens), None
    each = [_documents(bounds) for bounds in cu_seqlens]
    counts = [-1 if bounds is None else bounds.shape[0] for bounds in each]
    together = torch.cat([bounds for bounds in each if bounds is not None])
    return together, torch.tensor(counts, dtype=torch.int64, device="cpu")


def _documents(cu_seqlens: Sequence[int] | Tensor | None) -> Tensor | None:
    if cu_seqlens is None:
        return None
    if isinstance(cu_seqlens, Tensor):
        return _seen(host_boundaries(cu_seqlens)).clone()
    return _list("a boundary of cu_seqlens", cu_seqlens)


def _values(name: str, given: Any) -> Tensor | None:
    """One number for each sample, or one for all; those of this call."""
    if given is None:
        return None
    if isinstance(given, Tensor):
        return _seen(host_values(name, given)).clone()
    if isinstance(given, (list, tuple)):
        return _list(f"a number of {name}", given)
    return torch.tensor(graph_integer(name, given), dtype=torch.int64, device="cpu")


def _seen(x: Tensor) -> Tensor:
    """The tensor as a mode of fake tensors can see it: one that has values is a constant there."""
    if torch.compiler.is_compiling() or is_fake(x):
        return x
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None:
        return x
    with _disable_current_modes():
        values = x.tolist()
    return torch.tensor(values, dtype=x.dtype, device="cpu")


def _list(name: str, given: Sequence[int]) -> Tensor:
    return torch.tensor([graph_integer(name, x) for x in given], dtype=torch.int64, device="cpu")
