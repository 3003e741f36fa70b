"""Boolean masks in SDPA's meaning: planned where that can be, else added to the scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from usp.attention.given import Options, Tensors
from usp.attention.masking import planned
from usp.attention.watched import is_watched
from usp.planning.kinds import is_fake, tensor
from usp.planning.layout import Replicated
from usp.planning.masks.mask import Mask

# of masks that come again in every layer: a copy each
_KEPT, _MOST_VALUES = 2, 1 << 26
_seen: tuple[tuple[Any, Tensor, list[Mask] | None], ...] = ()


def with_attn_mask(tensors: Tensors, options: Options, alone: bool) -> tuple[Tensors, Options]:
    """``attn_mask`` as a part of ``mask`` or of ``attn_bias``; what is no such mask stays.

    Args:
        alone: Whether there is one rank. Where queries are not all here, other ranks' rows would
            have to be asked for.
    """
    mask, q, k = cast(Tensor, options.attn_mask), tensors.q, tensors.k
    if not all(isinstance(x, Tensor) for x in (mask, q, k)):
        return tensors, options  # refused later, on all ranks
    if mask.dtype != torch.bool or mask.dim() not in (2, 4):
        return tensors, options  # this, too
    mask = mask if mask.dim() == 4 else mask[None, None]
    # a graph and a fake tensor have no values to look at
    found, layout = None, options.layout
    everywhere = isinstance(layout, tuple) and isinstance((*layout, None)[0], Replicated)
    if (alone or everywhere) and not (torch.compiler.is_compiling() or is_fake(mask)):
        found = _planned(mask, (q.shape[1], mask.shape[3] if everywhere else k.shape[1]))
    if found is not None and len(found) in (1, q.shape[0]):
        return tensors, replace(options, attn_mask=None, mask=_both(options.mask, found))
    bias = tensors.attn_bias
    if bias is None:
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=mask.device)
    elif not _fit(mask.shape, tensor("attn_bias", bias).shape):
        raise ValueError(
            f"attn_mask is {tuple(mask.shape)}, and attn_bias {tuple(bias.shape)}: they must "
            "fit each other"
        )
    bias = torch.where(mask, bias, -torch.inf)
    return tensors._replace(attn_bias=bias), replace(options, attn_mask=None)


def _fit(mask: torch.Size, bias: torch.Size) -> bool:
    sizes = zip(mask, bias, strict=False)
    return len(mask) == len(bias) and all(m == b or 1 in (m, b) for m, b in sizes)


def _planned(mask: Tensor, shape: tuple[int, int]) -> list[Mask] | None:
    """As ``planned``; what one of the last masks has shown is not looked for again. Values are
    compared, and not who holds them, for these may be written to by whoever shares the memory."""
    global _seen
    is_kept = mask.is_contiguous() and mask.numel() <= _MOST_VALUES and not is_watched()
    if not is_kept or mask.device.type != "cpu" or mask.numel() % 8 or mask.storage_offset() % 8:
        return planned(mask, shape)
    words = mask.view(-1).view(torch.int64)  # which are compared ten times as fast
    for of, held, found in _seen:
        if of == (mask.shape, shape) and torch.equal(held, words):
            return found
    found = planned(mask, shape)
    _seen = (((mask.shape, shape), words.clone(), found), *_seen)[:_KEPT]
    return found


def _both(given: Any, found: list[Mask]) -> Any:
    """The masks of the options and of the tensor: what both open."""
    if given is None:
        return found if len(found) > 1 else found[0]
    if isinstance(given, Mask):
        each = [given & mask for mask in found]
        return each if len(each) > 1 else each[0]
    if not isinstance(given, (list, tuple)) or len(found) not in (1, len(given)):
        return given  # refused later
    found = found if len(found) > 1 else found * len(given)
    return [one & other for one, other in zip(given, found, strict=True)]
