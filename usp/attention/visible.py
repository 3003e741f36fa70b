"""The table of who sees whom, as an op for graphs: masks look at the values of positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from usp.attention.op_masks import said
from usp.planning.kinds import is_fake
from usp.planning.masks.mask import Mask, visible_keys
from usp.planning.masks.telling import from_told

_LIBRARY = torch.library.Library("usp", "FRAGMENT")


def visible(mask: Mask, positions: Tensor, key_len: int) -> Tensor:
    """``visible_keys``, also in a graph; arguments and result as there."""
    if torch.compiler.is_compiling() or is_fake(positions):
        return cast(Tensor, torch.ops.usp.visible_keys(positions, key_len, *said(mask)))
    return visible_keys(mask, positions, key_len)


def _visible(
    positions: Tensor, key_len: int, words: str, numbers: Sequence[int], tensors: Tensor | None
) -> Tensor:
    return visible_keys(from_told(words, numbers, tensors), positions, key_len)


_LIBRARY.define(
    "visible_keys(Tensor positions, SymInt key_len, str words, SymInt[] numbers, Tensor? tensors)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("visible_keys", _visible, "CompositeExplicitAutograd")
torch.library.register_fake(
    "usp::visible_keys",
    lambda positions, key_len, *_: positions.new_empty(
        (positions.shape[0], key_len), dtype=torch.bool
    ),
    lib=_LIBRARY,
)
