"""The options of ``long_context_attention`` that are short for masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from usp.planning.kinds import flag, integer
from usp.planning.masks.mask import Everything, Mask
from usp.planning.masks.terms import causal as causal_mask
from usp.planning.masks.terms import documents, first_keys, window


class Window(NamedTuple):
    """Keys before and after the query's own position; None is no bound."""

    left: int | None = None
    right: int | None = None


def make_mask(
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    cu_seqlens: Sequence[int] | Tensor | None = None,
    prefix_len: int | None = None,
) -> Mask:
    """The mask that the public options describe.

    Args:
        causal: Hide keys after the query's own global position.
        window_size: (left, right) keys visible beside the query's own position, None is no bound.
        cu_seqlens: Global boundaries of packed documents, ``(0, ..., total)``, host integers.
        prefix_len: First keys that ``causal`` opens to every query; a window still closes them.

    Raises:
        ValueError: a bound is negative, or boundaries decrease or do not start at 0.
    """
    mask: Mask = Everything()
    causal = flag("causal", causal)
    if prefix_len is not None:
        prefix_len = integer("prefix_len", prefix_len, least=0)
        if not causal:
            raise ValueError(
                f"prefix_len={prefix_len} opens keys that causal hides, but causal is False: "
                "pass causal=True or leave prefix_len out"
            )
    if causal:
        mask = causal_mask() | first_keys(prefix_len) if prefix_len else causal_mask()
    mask = mask & window(*check_window(window_size))
    return mask if cu_seqlens is None else mask & documents(cu_seqlens)


def check_window(window_size: Sequence[int | None]) -> Window:
    """The window of a pair (left, right).

    Raises:
        TypeError: a bound is no integer.
        ValueError: it is no pair, or a bound is below 0; names it.
    """
    if not isinstance(window_size, Sequence) or len(window_size) != 2:
        raise ValueError(f"window_size must be a pair (left, right), got {window_size!r}")
    sizes = [
        None if size is None else integer("window_size (None for no bound)", size)
        for size in window_size
    ]
    window(*sizes)
    return Window(*sizes)
