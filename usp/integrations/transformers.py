"""The door of Hugging Face transformers: ``attn_implementation="usp"``.

Its models ask two tables for an implementation by name: one makes masks, once in a forward, and one
computes attention, in every layer. What the first makes is handed to the second as it is, so masks
travel as bands and never as a square.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from usp.attention.functional import long_context_attention
from usp.integrations._answer import Tokens, answer, refuse
from usp.integrations._region import Region, current_region
from usp.integrations._transformers_cache import sharded_cache
from usp.integrations._transformers_latents import NAME, Latents, behind
from usp.integrations._transformers_masks import Described, describe

__all__ = ["NAME", "attention", "register", "sharded_cache"]


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
    alone = region is None or len(region.tokens.shares) == 1
    latents, layer = behind(key)
    if layer is not None:
        layer.keep(latents)
        if position_bias is not None:
            raise NotImplementedError(_OF_BIAS)
        layer.read(attention_mask, hint)
        if alone:
            if region is not None:
                region.answered += 1
            return layer.attend(query, latents, options), None
    if region is None or (alone and region.tokens.spread.cu_seqlens is None and not region.pieces):
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
    made_first = isinstance(attention_mask, Tensor) or region.pieces
    if latents is not None and made_first:
        (key, value), latents = latents.open(), None
    return _spread(region, query, (key, value, latents), attention_mask, hint, options)


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
            options = options | mask.options() | {"query_offset": mask.offset}
            mask = None
            hint = False
    if isinstance(mask, Tensor):
        options = options | {"attn_mask" if mask.dtype == torch.bool else "attn_bias": mask}
    elif hint:
        options = options | {"causal": query.shape[2] > 1}
    return cast(Tensor, long_context_attention(q, k, v, **options)), None


def _spread(
    region: Region,
    query: Tensor,
    keys: tuple[Tensor, Tensor, Latents | None],
    mask: Described | Tensor | None,
    hint: bool,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    tokens, (key, value, latents) = region.tokens, keys
    fault = _fault(tokens, query, key, mask, options)
    if fault is not None:
        refuse(tokens.spread, fault)
    if isinstance(mask, Tensor):
        scale, dropout = options["softmax_scale"], options["dropout_p"]
        grouped = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
        out = answer(tokens, query, key, value, mask, dropout, **grouped, pieces=region.pieces)
        return out.transpose(1, 2), None
    if mask is None:
        options = options | {"causal": hint}
    else:
        options = options | mask.options()
        if tokens.cut:  # made of this rank's tokens: where documents end the Spread says
            options.pop("cu_seqlens", None)
        elif "key_padding_mask" in options:
            options["key_padding_mask"] = tokens.spread.shard(options["key_padding_mask"])
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if latents is not None:
        return latents.spread(tokens.spread, q, options), None
    return cast(Tensor, tokens.attention(q, k, v, **options, **region.pieces)), None


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
            f"of {length} tokens: other sequences are not spread, and of caches this door's "
            "sharded_cache(mesh) alone; call the model with it or use_cache=False, on the whole "
            "sequence"
        )
    if isinstance(mask, Tensor):
        if options["softcap"] is not None or options["sinks"] is not None:
            return NotImplementedError(
                f"a mask of {tuple(mask.shape)} beside softcap or sinks: pass a 2-D attention_mask"
            )
        return None
    if mask is None:
        return None
    made_of = tokens.held if tokens.cut else length
    if mask.lengths != (made_of, made_of) or mask.offset != 0:
        return ValueError(
            f"a mask of {mask.lengths[0]} queries from {mask.offset} and {mask.lengths[1]} keys, "
            f"where {length} tokens are spread, and masks are made of {made_of}: without a cache "
            "(use_cache=False), where whole tokens come in before they are cut"
        )
    if mask.mask is None:
        return NotImplementedError(
            "a mask by a function of your own, or of one that is not known to be of bands: causal, "
            "bidirectional, sliding windows, padding and packed documents are"
        )
    return None
