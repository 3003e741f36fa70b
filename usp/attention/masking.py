"""The options that say who sees whom, as one mask or one for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from usp.planning.kinds import integer, tensor
from usp.planning.masks.dense import in_few_bands
from usp.planning.masks.mask import Everything, Mask, shifted
from usp.planning.masks.options import make_mask
from usp.planning.masks.terms import documents, first_keys
from usp.planning.samples import Masks, masks_of

NAMES = "mask (causal, window_size, cu_seqlens, prefix_len, mask, key_lengths, query_offset)"


@dataclass(frozen=True)
class MaskOptions:
    """The mask options of ``long_context_attention``; see there."""

    causal: bool = False
    window_size: tuple[int | None, int | None] = (None, None)
    cu_seqlens: Any = None
    prefix_len: int | None = None
    mask: Mask | Sequence[Mask] | None = None
    key_lengths: Sequence[int] | Tensor | None = None
    query_offset: int | Sequence[int] | Tensor = 0


def make_masks(options: MaskOptions, batch: int) -> Masks:
    """Who sees whom in each sample of a batch.

    Raises:
        TypeError, ValueError: an option is of another kind, or for another number of samples.
    """
    if not batch or _are_a_few_numbers(options):
        return _plain(options)
    base = make_mask(
        causal=options.causal, window_size=options.window_size, prefix_len=options.prefix_len
    )
    given = _each("mask", options.mask, batch, _is_list)
    check_mask(given)
    packed = _each("cu_seqlens", options.cu_seqlens, batch, is_nested)
    lengths = _each("key_lengths", _on_host("key_lengths", options.key_lengths), batch, _is_list)
    offsets = _each("query_offset", _on_host("query_offset", options.query_offset), batch, _is_list)
    if options.key_lengths is not None and len(lengths) != batch:
        raise TypeError(f"key_lengths must be one length for each of {batch} samples")
    options_of = [given, packed, lengths, offsets]
    count = max(map(len, options_of))
    each = list(zip(*(x * count if len(x) == 1 else x for x in options_of), strict=True))
    found = [_one(base, *sample) for sample in each]
    whole = [integer("query_offset", offset) for *_, offset in each]
    return masks_of(found, whole) if count > 1 else masks_of(found[0], whole[0])


def _plain(options: MaskOptions) -> Masks:
    """The masks of causal, window and prefix; made once for the same ones."""
    given = options.causal, options.window_size, options.prefix_len
    sizes = (*given[1], given[2]) if isinstance(given[1], tuple) else given
    simple = type(given[0]) is bool and all(x is None or type(x) is int for x in sizes)
    # others are equal to some of these, and refused or converted
    return _cached(*given) if simple else _made(*given)


def _made(causal: bool, window_size: Any, prefix_len: int | None) -> Masks:
    return masks_of(make_mask(causal=causal, window_size=window_size, prefix_len=prefix_len))


_cached = lru_cache(maxsize=256)(_made)


def _are_a_few_numbers(options: MaskOptions) -> bool:
    """Whether nothing is told but causal, window and prefix."""
    others = options.mask, options.cu_seqlens, options.key_lengths
    offset = options.query_offset
    return all(other is None for other in others) and type(offset) is int and offset == 0


def check_mask(mask: Any) -> Mask | Sequence[Mask] | None:
    """``mask`` itself if it is one, a list of them, or none.

    Raises:
        TypeError: it is something else; says what to do.
    """
    for each in mask if _is_list(mask) else (mask,):
        if each is not None and not isinstance(each, Mask):
            raise TypeError(
                "mask must be a mask of usp.masks, or a list of one for each sample, got a "
                f"{type(each).__name__}: a boolean tensor is an attn_mask"
            )
    return cast("Mask | Sequence[Mask] | None", mask)


def _one(base: Mask, mask: Any, cu_seqlens: Any, key_length: Any, query_offset: Any) -> Mask:
    """The mask of one sample."""
    whole = base & (mask or Everything())
    if cu_seqlens is not None:
        whole = whole & documents(cu_seqlens)
    whole = shifted(whole, integer("query_offset", query_offset))
    if key_length is None:
        return whole
    return whole & first_keys(integer("a length of key_lengths", key_length, least=0))


def _each(name: str, given: Any, batch: int, is_list: Any) -> list[Any]:
    """What was given for each sample, or once for all."""
    if not is_list(given):
        return [given]
    if len(given) != batch:
        raise ValueError(
            f"{name} has {len(given)} entries, one a sample, but q has {batch} samples"
        )
    return list(given)


def _is_list(given: Any) -> bool:
    return isinstance(given, (list, tuple))


def is_nested(given: Any) -> bool:
    """Whether these are boundaries of each sample."""
    return isinstance(given, (list, tuple)) and any(
        isinstance(each, (list, tuple, range, Tensor)) and not _is_number(each) for each in given
    )


def _is_number(given: Any) -> bool:
    return isinstance(given, Tensor) and given.dim() == 0


def _on_host(name: str, given: Any) -> Any:
    """Numbers in a tensor as a list."""
    return host_values(name, given).tolist() if isinstance(given, Tensor) else given


def host_values(name: str, given: Tensor) -> Tensor:
    """The tensor itself.

    Raises:
        ValueError: it is not on the host.
    """
    if given.device.type != "cpu":
        raise ValueError(
            f"{name} must be host integers (a tuple or a CPU tensor), got a tensor on "
            f"{given.device}: planning must not wait for the device"
        )
    return given


def refuse_lengths(masks: Masks, query_len: int, key_len: int) -> None:
    """Refuse masks that do not fit the whole sequences."""
    for _, mask, _ in masks:
        mask.refuse_lengths(query_len, key_len)


def refuse_attn_mask(attn_mask: object) -> None:
    """Raise for what is no boolean mask of two or four dims.

    Raises:
        TypeError, ValueError: says what it is and what to do.
    """
    found = tensor("attn_mask", attn_mask)
    if found.dtype != torch.bool:
        raise TypeError(
            f"attn_mask must be bool, True where a query sees a key, got {found.dtype}: what is "
            "added to the scores is an attn_bias"
        )
    if found.dim() == 3:
        raise ValueError(
            f"attn_mask of three dims {tuple(found.shape)} could be of samples or of heads: give "
            "it four, (batch|1, heads|1, queries|1, keys)"
        )
    if found.dim() not in (2, 4):
        raise ValueError(
            f"attn_mask must be (queries, keys) or (batch|1, heads|1, queries|1, keys), got "
            f"{tuple(found.shape)}"
        )


def planned(attn_mask: Tensor, shape: tuple[int, int]) -> list[Mask] | None:
    """A boolean mask as one mask, or one for each sample, where its rows are a few runs of keys.

    Args:
        attn_mask: (B|1, H|1, Lq|1, Sk) bool.
        shape: Queries and keys.
    """
    if attn_mask.shape[1] != 1 or attn_mask.shape[2:] != shape or attn_mask.device.type != "cpu":
        return None
    found = [in_few_bands(sample[0]) for sample in attn_mask]
    return None if None in found else cast(list[Mask], found)
