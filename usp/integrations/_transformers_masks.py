"""Masks of transformers, which are closures of a few factories, read as masks of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from usp.masks import causal, everything, window
from usp.planning.masks.mask import Mask


@dataclass(frozen=True, eq=False)
class Described:
    """What the mask table makes in place of a tensor.

    Attributes:
        mask: By position in the sequence; None where it is none of bands.
        padding: (B, keys) bool, True where a key is no padding.
        documents: Boundaries of each sample's documents.
        offset: Position of the first query among the keys; None where it is no number.
        lengths: Queries and keys.
        dense: Makes the tensor that "sdpa" takes.
    """

    mask: Mask | None
    padding: Tensor | None
    documents: tuple[tuple[int, ...], ...] | None
    offset: int | None
    lengths: tuple[int, int]
    dense: Callable[[], Tensor | None]

    def options(self) -> dict[str, Any]:
        """As options of ``long_context_attention``, with the padding of all keys."""
        found: dict[str, Any] = {"mask": self.mask}
        if self.documents is not None:
            each = self.documents
            found["cu_seqlens"] = list(each) if len(set(each)) > 1 else each[0]
        if self.padding is not None:
            found["key_padding_mask"] = ~self.padding
        return found


def describe(
    mask_function: Callable[..., Any],
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **options: Any,
) -> Described:
    """The function of transformers' mask table; its arguments as there."""
    from transformers.masking_utils import sdpa_mask

    given = {"q_length": q_length, "kv_length": kv_length, "mask_function": mask_function}
    given |= {"q_offset": q_offset, "kv_offset": kv_offset, "attention_mask": attention_mask}
    found = None if use_vmap else _read(mask_function)
    mask, packed = (None, None) if found is None else found
    padding = None
    if attention_mask is not None:
        missing = kv_length + kv_offset - attention_mask.shape[-1]
        padding = torch.nn.functional.pad(attention_mask.bool(), (0, max(0, missing)))
        padding = padding[:, kv_offset : kv_offset + kv_length]
    return Described(
        mask,
        padding,
        None if packed is None else _boundaries(packed),
        q_offset - kv_offset if isinstance(q_offset, int) else None,
        (q_length, kv_length),
        lambda: sdpa_mask(**given, use_vmap=use_vmap, **options),
    )


def _read(function: Callable[..., Any]) -> tuple[Mask, Tensor | None] | None:
    """The mask that a function of transformers says, and the documents (B, tokens) that it holds;
    None where it is another's, or one that is not known here.

    They are closures of a few factories, whose names and variables say what they are.
    """
    if not getattr(function, "__module__", "").startswith("transformers."):
        return None
    names = function.__code__.co_freevars
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    held = dict(zip(names, cells, strict=True))
    kind = function.__qualname__.partition(".")[0]
    if kind == "causal_mask_function":
        return causal(), None
    if kind == "bidirectional_mask_function":
        return everything(), None
    if kind == "sliding_window_overlay":
        return window(held["sliding_window"] - 1, None), None
    if kind == "sliding_window_bidirectional_overlay":
        return window(held["sliding_window"], held["sliding_window"]), None
    if kind == "packed_sequence_mask_function":
        return everything(), held["packed_sequence_mask"]
    if kind == "remap_positions_for_packed_sequence":  # distances inside a document are the same
        return _read(held["mask_function"])
    if kind == "and_masks":
        return reduce(_both, map(_read, held["mask_functions"]))
    return None


Read = tuple[Mask, Tensor | None] | None


def _both(one: Read, other: Read) -> Read:
    if one is None or other is None or (one[1] is not None and other[1] is not None):
        return None
    return one[0] & other[0], one[1] if other[1] is None else other[1]


def _boundaries(packed: Tensor) -> tuple[tuple[int, ...], ...]:
    """(B, tokens) number of each token's document -> the boundaries of each sample."""
    length, found = packed.shape[1], []
    for changes in (packed.diff(dim=1) != 0).tolist():
        found.append((0, *(i + 1 for i, change in enumerate(changes) if change), length))
    return tuple(found)
