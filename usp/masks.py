"""Masks: who sees whom, by global positions. ``causal() & (window(512, 512) | first_keys(4))``.

``&`` is what both masks open, ``|`` what either opens, ``~`` what one hides. Masks are hashable,
compare by value and are printed as the calls that make them; docs/masks.md draws them.
"""

from usp.planning.masks.dense import from_dense, from_function
from usp.planning.masks.mask import Mask, shifted
from usp.planning.masks.neighbourhood import neighbourhood
from usp.planning.masks.terms import (
    blocks,
    causal,
    documents,
    everything,
    first_keys,
    first_queries,
    nothing,
    shared_prefix,
    window,
)

__all__ = [
    "Mask",
    "blocks",
    "causal",
    "documents",
    "everything",
    "first_keys",
    "first_queries",
    "from_dense",
    "from_function",
    "neighbourhood",
    "nothing",
    "shared_prefix",
    "shifted",
    "window",
]
