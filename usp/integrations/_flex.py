"""``flex_attention`` of the whole sequence, for what a rank holds of it.

It is a function of Python that compares lengths before it calls anything which a mode of torch's
functions sees. So its code is led through here, once, under whatever name models know it; outside
of regions, and in regions of one rank without documents, it is torch's as it was.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from usp.integrations._answer import Tokens, among, refuse
from usp.integrations._region import Region, current_region
from usp.planning.masks.dense import from_function
from usp.planning.masks.mask import Mask

_MODULE = "torch.nn.attention.flex_attention"
# by block mask: layers share one, and a table of it takes a look at all pairs
_TABLES: WeakKeyDictionary[Any, tuple[Mask, ...]] = WeakKeyDictionary()
_called_in_usp: Any = None  # what the code below finds among the globals of torch's module


def lead_through() -> None:
    """From here on ``flex_attention`` asks whether it is called in a region; once for a process.

    Where nobody has imported it there is nothing to do yet.
    """
    if torch.compiler.is_compiling():
        return
    module = sys.modules.get(_MODULE)
    if module is None or "_called_in_usp" in vars(module):
        return
    function = module.flex_attention
    if not isinstance(function, types.FunctionType) or function.__closure__:
        return  # another torch's, which compares lengths, or is refused
    torchs = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    torchs.__kwdefaults__ = function.__kwdefaults__
    signature = inspect.signature(function)

    def called(*args: Any, **kwargs: Any) -> Any:
        region = current_region()
        if region is None or region.tokens.is_alone:
            return torchs(*args, **kwargs)
        if torch.compiler.is_compiling():
            return torch.compiler.disable(_answered)(region, torchs, args, kwargs)
        return _answered(region, torchs, args, kwargs)

    vars(module)["_called_in_usp"] = called
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__code__ = _led.__code__
    function.__defaults__ = function.__kwdefaults__ = None


def _led(*args: Any, **kwargs: Any) -> Any:
    return _called_in_usp(*args, **kwargs)


def _answered(
    region: Region, torchs: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    tokens, given = region.tokens, inspect.signature(torchs).bind(*args, **kwargs)
    given.apply_defaults()
    told = given.arguments
    query, key, value = told["query"], told["key"], told["value"]
    lengths = {query.shape[-2], key.shape[-2]}
    if lengths <= tokens.whole or (len(tokens.shares) == 1 and lengths != {tokens.held}):
        return torchs(*args, **kwargs)  # of another sequence, which every rank holds
    try:
        with region.paused():
            masks = _options(tokens, told)
    except (ValueError, TypeError, NotImplementedError) as refusal:
        refuse(tokens.spread, refusal)
    region.count()
    aux = told.get("return_aux")
    wants_lse = told.get("return_lse", False) or (aux is not None and aux.lse)
    more = {"softmax_scale": told["scale"], "return_lse": wants_lse} | masks
    found = among(tokens, query, key, value, told["enable_gqa"], **more, **region.pieces)
    out, lse = found if isinstance(found, tuple) else (found, None)
    out = out.transpose(1, 2)
    if aux is not None:
        return out, type(torchs.__globals__["AuxOutput"]())(lse=lse)
    return (out, lse) if wants_lse else out


def _options(tokens: Tokens, told: dict[str, Any]) -> dict[str, Any]:
    """The mask of a call, as an option of ours.

    Raises:
        NotImplementedError, ValueError, TypeError: it is none that bands say; says why.
    """
    length, score_mod, blocks = tokens.spread.seq_len, told["score_mod"], told["block_mask"]
    if score_mod is not None:
        raise NotImplementedError(
            f"flex_attention is given score_mod {_name(score_mod)}, a function of scores, which "
            "no kernel here calls: usp.long_context_attention has softcap, alibi_slopes and "
            "attn_bias, and block_mask is taken"
        )
    aux = told.get("return_aux")
    if aux is not None and aux.max_scores:
        raise NotImplementedError("flex_attention is asked for max_scores, which nobody keeps here")
    if tokens.across:
        raise NotImplementedError(
            "flex_attention where other tokens are looked at, which every rank holds whole: call "
            "F.scaled_dot_product_attention"
        )
    if blocks is None or blocks.mask_mod is None:
        return {}
    if not tokens.ordered:
        raise NotImplementedError(
            "flex_attention is given block_mask, which goes by positions, where two streams of "
            f"{tokens.parts} tokens are cut each by itself"
        )
    if tuple(blocks.shape[-2:]) != (length, length):
        raise ValueError(
            f"block_mask is of {blocks.shape[-2]} queries and {blocks.shape[-1]} keys, where this "
            f"rank holds {tokens.held} of {length} tokens: make it of all {length}, before tokens "
            "are cut"
        )
    if blocks not in _TABLES:
        _TABLES[blocks] = _tables(blocks, length)
    masks = _TABLES[blocks]
    if len(masks) not in (1, len(told["query"])):
        raise ValueError(
            f"block_mask is of {len(masks)} samples, and the batch has {len(told['query'])}"
        )
    return {"mask": masks[0] if len(set(masks)) == 1 else list(masks)}


def _tables(blocks: Any, length: int) -> tuple[Mask, ...]:
    """A mask of each sample that a block mask tells apart."""
    samples, heads = blocks.kv_num_blocks.shape[:2]
    if heads > 1:
        raise NotImplementedError(
            f"block_mask is of {heads} heads, and a mask is the same for all: create_block_mask "
            "with H=None, or pass attn_bias to usp.long_context_attention"
        )

    def of_sample(n: int) -> Mask:
        def seen(_: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
            sample = torch.tensor(n, device="cpu")
            return torch.as_tensor(blocks.mask_mod(sample, head, query, key)).cpu()

        return from_function(seen, (length, length))

    try:
        return tuple(map(of_sample, range(samples)))
    except (ValueError, TypeError) as fault:
        raise type(fault)(f"mask_mod {_name(blocks.mask_mod)} of block_mask: {fault}") from None


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", function))
