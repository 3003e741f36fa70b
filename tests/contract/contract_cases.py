"""What a kernel promises, as one table: a row is a call of the contract (docs/contract.md).

Which kernels are held to which row stands in ``subjects``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

Changes = Mapping[str, Any]

SPANS = ("all", "causal", "window", "strictly_causal", "documents", "gaps", "random")
BIASES = ["".join(pick) for pick in itertools.product("B1", "H1", "Q1", "K")]
# heads held here, the first one's global number, query heads that share a key head
HEADS = ((4, 0, 2), (3, 0, 1), (3, 1, 2), (5, 3, 4), (1, 6, 7), (6, 0, 6), (2, 7, 8))
LAYOUTS = ("contiguous", "heads_first", "sliced", "expanded")
# of q and k, and of v: of every padded size of the tiles, odd ones, either the larger
HEAD_DIMS = (
    *((1, 16), (5, 33), (8, 64), (24, 96), (32, 32), (40, 64), (40, 256), (61, 37), (64, 192)),
    *((72, 64), (80, 16), (96, 72), (128, 16), (128, 128), (192, 128), (256, 256)),
)
# of each size that a GPU kernel is compiled for, in and out
HEAD_DIMS_OF_KERNELS = (
    *((32, 32), (40, 256), (64, 192), (96, 72), (128, 128), (192, 128), (256, 256)),
)


def dims(head_dim: int, value_head_dim: int | None = None) -> dict[str, int]:
    return {"head_dim": head_dim, "value_head_dim": value_head_dim or head_dim}


EVERYTHING = {
    "batch": 2,
    "span": "causal",
    "bias": "B1QK",
    "alibi": "BH",
    "softcap": 2.0,
    "dropout_p": 0.2,
    "prior_keys": 23,
    "value_head_dim": 9,
}

ROWS: dict[str, Changes] = {
    "plain": {},
    # which keys a query sees
    **{f"span_{span}": {"span": span} for span in SPANS[1:]},
    "wide_gap": {"span": "gaps", "lq": 67, "lk": 307, "prior_keys": 1},
    # what changes a score or a weight
    **{f"bias_{bias}": {"bias": bias, "batch": 2} for bias in BIASES},
    "bias_with_holes": {"bias": "BHQK", "bias_holes": True, "batch": 2},
    "bias_with_holes_in_a_window": {"bias": "BHQK", "bias_holes": True, "span": "window"},
    "padding": {"bias": "B11K", "bias_holes": True, "span": "causal", "batch": 2},
    "softcap": {"softcap": 1.5},
    "softcap_far_above_the_scores": {"softcap": 1000.0},
    "alibi": {"alibi": "1H", "batch": 2},
    "alibi_of_each_batch": {"alibi": "BH", "span": "causal", "batch": 2},
    "dropout": {"dropout_p": 0.3},
    # a union of bands: the same keys come more than once
    "bands": {"span": "bands", "prior_keys": 13},
    "bands_at_once": {"span": "bands_at_once", "prior_keys": 13},
    "many_bands": {"span": "many_bands", "lq": 151, "bias": "B11K"},
    # what a first call has left
    "carried_state": {"prior_keys": 200, "span": "random"},
    # sizes
    "second_batch": {"batch": 2, "span": "causal", "layout": "heads_first"},
    **{f"heads_{'_'.join(map(str, heads))}": {"heads": heads} for heads in HEADS},
    **{
        f"head_dims_{d}_{dv}": {**dims(d, dv), "span": "causal", "prior_keys": 29}
        for d, dv in HEAD_DIMS
    },
    **{
        f"head_dims_with_softcap_{d}_{dv}": {**dims(d, dv), "span": "causal", "softcap": 3.0}
        for d, dv in HEAD_DIMS_OF_KERNELS
    },
    "head_dims_512_257": {**dims(512, 257), "lq": 19},
    "long": {"lq": 521, "lk": 1031, "span": "causal", "batch": 1, "heads": (2, 0, 2)},
    "no_heads": {"heads": (0, 2, 2)},
    "no_queries": {"lq": 0, "span": "causal"},
    "no_keys": {"lk": 0},
    "no_batch": {"batch": 0},
    "no_batch_with_a_bias": {"batch": 0, "bias": "1HQK"},
    "one_query": {"lq": 1},
    "one_query_with_a_bias": {"lq": 1, "bias": "BHQK"},
    "one_key": {"lk": 1},
    "one_key_with_a_bias": {"lk": 1, "bias": "BHQK"},
    "one_by_one": {"lq": 1, "lk": 1},
    "one_number": {"lq": 1, "lk": 1, "head_dim": 1, "value_head_dim": 1},
    # where the rows lie in memory: NaN between those that are sliced
    "strides_heads_first": {"layout": "heads_first"},
    "strides_sliced": {"layout": "sliced", "span": "window", "batch": 2},
    "strides_expanded": {"layout": "expanded", "batch": 2},
    # the last one is what a rehearsal of a GPU's tests runs
    "everything": EVERYTHING,
}

# The last block of keys. In the window and where nothing is seen, whole tiles of rows see nothing,
# and no step of the loop over keys reaches them. On terraces some rows of a tile begin before
# others, and before the keys that all of them see.
RESULTS: dict[str, Changes] = {
    "all": {"lq": 131},
    "gaps": {},
    "strictly_causal": {},
    "nothing": {},
    "window": {"lq": 101, "lk": 16},
    # of the CPU's kernels alone
    "terraces": {"batch": 1, "lq": 67, "lk": 401, "heads": (1, 0, 1)},
    "bands_at_once": {"lq": 199},
    "sinks_and_registers": {"lq": 601, "lk": 907, "heads": (3, 1, 1)},
}

# Gradients that are written over and not added to.
OVERWRITTEN: dict[str, Changes] = {
    "plain": {},
    "one_head_of_many_keys": {"batch": 1, "lq": 130, "lk": 600, "heads": (1, 0, 1)},
    "shared_key_heads": {"heads": (5, 3, 4), "lq": 131},
    "options": {"bias": "11QK", "softcap": 2.0, "batch": 2},
    "no_multiple_of_8": dims(61, 37),
    "dk_in_parts": {"lq": 37, "lk": 41, **dims(192, 136)},
    "dk_in_parts_with_options": {"lq": 37, "lk": 41, "head_dim": 256, "alibi": "1H"},
    "gaps": {"span": "gaps", "lk": 257},
    "unseen_keys": {"span": "window", "lk": 401},
    "bands_at_once": {"span": "bands_at_once", "lq": 331, "lk": 601},
    "many_bands": {"span": "many_bands", "lq": 131, "lk": 601},
    "keys_move_along": {"span": "sinks_and_registers", "lq": 197, "lk": 1500},
    "nothing_is_seen": {"lq": 131, "span": "nothing"},
    "no_queries": {"lq": 0},
    "no_keys": {"lk": 0},
}

# Calls whose bits may depend on nothing but the inputs.
BITS: dict[str, Changes] = {
    "causal": {"span": "causal", "prior_keys": 17, "heads": (1, 0, 1)},
    "causal_dropout_alibi": {
        "span": "causal",
        "heads": (1, 0, 1),
        "alibi": "1H",
        "dropout_p": 0.25,
    },
    "padding": {"lq": 150, "heads": (3, 1, 2), "bias": "B11K"},
    "causal_padding": {"lq": 150, "heads": (3, 1, 2), "bias": "B11K", "span": "causal"},
    "padding_with_holes_of_batches": {
        "lq": 150,
        "heads": (3, 1, 2),
        "batch": 2,
        "head_dim": 16,
        "bias": "B11K",
        "bias_holes": True,
    },
    "everything": {**EVERYTHING, "lq": 150, "heads": (3, 1, 2)},
    "long": {**ROWS["long"], "heads": (3, 1, 2), "bias": "B11K"},
    **{
        f"random_dropout_{bias or 'no_bias'}": {
            "lq": 400,
            "lk": 517,
            "span": "random",
            "dropout_p": 0.1,
            "bias": bias,
        }
        for bias in (None, "11QK", "B11K")
    },
}
