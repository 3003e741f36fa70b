"""The door of Hugging Face transformers: ``attn_implementation="usp"``.

Its models ask two tables for an implementation by name: one makes masks, once in a forward, and one
computes attention, in every layer. What the first makes is handed to the second as it is, so masks
travel as bands and never as a square.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor

from usp.attention.functional import long_context_attention
from usp.integrations._answer import Tokens, answer, refuse
from usp.integrations._region import Region, current_region
from usp.masks import causal, everything, window
from usp.planning.masks.mask import Mask

NAME = "usp"


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


def register() -> None:
    """Make ``attn_implementation="usp"`` known to transformers; a second time changes nothing.

    A model with it is what it is with "sdpa", and knows softcap and sinks, too; in a trunk of
    ``usp.parallelize`` its attention is that of the whole sequence.

    Raises:
        ModuleNotFoundError: transformers is not there; says which command installs it.

    Example:
        >>> from usp.integrations import transformers as door
        >>> door.register()
        >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="usp")
        >>> model = usp.parallelize(model, mesh, layout="zigzag")
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ModuleNotFoundError as missing:
        if missing.name != "transformers":
            raise
        raise ModuleNotFoundError(
            "transformers is not installed: pip install 'usp[transformers]'", name="transformers"
        ) from None
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, describe)


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


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Described | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function of transformers' attention table; its arguments as there.

    Args:
        query: (B, H, local queries, D). key, value: (B, G, keys, D or Dv).

    Returns:
        (B, local queries, H, Dv), and no weights.
    """
    hint = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    options = {"softmax_scale": scaling, "dropout_p": dropout, "softcap": softcap, "sinks": s_aux}
    region = current_region()
    if region is None or len(region.tokens.shares) == 1:
        if region is not None:
            region.answered += 1
        if softcap is None and s_aux is None:
            return _of_sdpa(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                is_causal=is_causal, position_bias=position_bias, **others,
            )  # fmt: skip
        return _alone(query, key, value, attention_mask, hint, options)
    if position_bias is not None:
        refuse(region.tokens.spread, NotImplementedError(_OF_BIAS))
    region.answered += 1
    return _spread(region, query, key, value, attention_mask, hint, options)


_OF_BIAS = (
    "position_bias is made from this rank's own tokens: pass the whole table of relative positions "
    "as attn_bias of usp.long_context_attention instead"
)


def _of_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Described | Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    from transformers import AttentionInterface

    dense = mask.dense() if isinstance(mask, Described) else mask
    return cast(
        tuple[Tensor, None],
        AttentionInterface()["sdpa"](module, query, key, value, dense, **options),
    )


def _alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Described | Tensor | None,
    hint: bool,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    """On one device, with what "sdpa" has not: softcap and sinks."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if isinstance(mask, Described):
        if mask.mask is None or mask.offset is None:
            mask = mask.dense()
        else:
            options = options | _bands(mask) | {"query_offset": mask.offset}
            mask = None
            hint = False
    if isinstance(mask, Tensor):
        options = options | {"attn_mask" if mask.dtype == torch.bool else "attn_bias": mask}
    elif hint:
        options = options | {"causal": query.shape[2] > 1}
    return cast(Tensor, long_context_attention(q, k, v, **options)), None


def _bands(described: Described) -> dict[str, Any]:
    found: dict[str, Any] = {"mask": described.mask}
    if described.documents is not None:
        each = described.documents
        found["cu_seqlens"] = list(each) if len(set(each)) > 1 else each[0]
    if described.padding is not None:
        found["key_padding_mask"] = ~described.padding
    return found


def _spread(
    region: Region,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Described | Tensor | None,
    hint: bool,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    tokens = region.tokens
    fault = _fault(tokens, query, key, mask, options)
    if fault is not None:
        refuse(tokens.spread, fault)
    if isinstance(mask, Tensor):
        scale, dropout = options["softmax_scale"], options["dropout_p"]
        grouped = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
        out = answer(tokens, query, key, value, mask, dropout, **grouped)
        return out.transpose(1, 2), None
    if mask is None:
        options = options | {"causal": hint}
    else:
        options = options | _bands(mask)
        if "key_padding_mask" in options:
            options["key_padding_mask"] = tokens.spread.shard(options["key_padding_mask"])
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return cast(Tensor, tokens.spread.attention(q, k, v, **options)), None


def _fault(
    tokens: Tokens,
    query: Tensor,
    key: Tensor,
    mask: Described | Tensor | None,
    options: dict[str, Any],
) -> Exception | None:
    """What is no attention among the tokens of the region, or is not known to be."""
    length, queries, keys = tokens.spread.seq_len, query.shape[2], key.shape[2]
    if not queries == keys == tokens.held:
        return ValueError(
            f"attention of {queries} queries and {keys} keys, where this rank holds {tokens.held} "
            f"of {length} tokens: caches and other sequences are not spread; call the model with "
            "use_cache=False, on the whole sequence"
        )
    if isinstance(mask, Tensor):
        if options["softcap"] is not None or options["sinks"] is not None:
            return NotImplementedError(
                f"a mask of {tuple(mask.shape)} beside softcap or sinks: pass a 2-D attention_mask"
            )
        return None
    if mask is None:
        return None
    if mask.lengths != (length, length) or mask.offset != 0:
        return ValueError(
            f"a mask of {mask.lengths[0]} queries from {mask.offset} and {mask.lengths[1]} keys, "
            f"where {length} tokens are spread: masks are made before tokens are cut, without a "
            "cache (use_cache=False)"
        )
    if mask.mask is None:
        return NotImplementedError(
            "a mask by a function of your own, or of one that is not known to be of bands: causal, "
            "bidirectional, sliding windows, padding and packed documents are"
        )
    return None
