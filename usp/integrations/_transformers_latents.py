"""Latent attention (MLA) of transformers' models: what keys and values are made of, kept as it is.

Their attention makes keys and values of latents by a method of its own, between the cache and the
function of the attention table. So that method is led through here, once for a class: where tokens
are spread, or latents have come to a sharded cache, it hands on what stands for keys and values,
and the latents with it. Anywhere else it is as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from usp.attention.latent import latent_attention
from usp.integrations._region import current_region
from usp.nn.spread import Spread

NAME = "usp"
_MODELS = "transformers.models"
_FILES = tuple(
    f"{_MODELS}.{folder}.modeling_{folder}"
    for folder in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
)
_METHOD = "expand_kv"
# by what stands for keys, which alone comes to the function of attention
_BEHIND: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# by keys or latents that have come to a cache of ours a moment ago, its layer
_CACHED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# one for each that is in these and not told yet: a graph can see whether there are any
_UNTOLD: list[None] = []


@dataclass(frozen=True, eq=False)
class Latents:
    """What the keys and values of a call are made of.

    Attributes:
        latent, rope_key: (B, 1, tokens, C) and (B, 1, tokens, Dr).
        up_k, up_v: (H, D - Dr, C) and (H, Dv, C), parts of the module's weight.
        open: Makes keys and values of them, as the module does.
    """

    latent: Tensor
    rope_key: Tensor
    up_k: Tensor
    up_v: Tensor
    open: Callable[[], tuple[Tensor, Tensor]]

    @property
    def together(self) -> Tensor:
        """(B, tokens, 1, C + Dr): one head of keys, whose first dims are its values."""
        return torch.cat((self.latent, self.rope_key), -1).transpose(1, 2)

    def spread(self, spread: Spread, query: Tensor, options: dict[str, Any]) -> Tensor:
        """Attention of the whole: (B, local queries, H, D) -> (B, local queries, H, Dv)."""
        of = self.latent[:, 0], self.rope_key[:, 0], self.up_k, self.up_v
        given = {**spread.options, **options, "validate": spread.validate}
        return cast(Tensor, latent_attention(query, *of, **given))

    def lowered(self, query: Tensor) -> Tensor:
        """Queries (B, tokens, H, D) as they meet the latents themselves: (B, tokens, H, C + Dr)."""
        plain, turned = query.split((self.up_k.shape[1], self.rope_key.shape[-1]), -1)
        return torch.cat((torch.einsum("blhd,hdc->blhc", plain, self.up_k), turned), -1)

    def raised(self, out: Tensor) -> Tensor:
        """Means of latents (B, tokens, H, C) as means of values: (B, tokens, H, Dv)."""
        return torch.einsum("blhc,hvc->blhv", out, self.up_v)


def note_cached(key: Tensor, layer: Any) -> None:
    """These have come to a layer of a cache, which ``behind`` tells once."""
    _note(_CACHED, key, layer)


def behind(key: Tensor) -> tuple[Latents | None, Any]:
    """What these keys stand for and the layer that they have come to, each told once; None for
    keys that are keys, and are in no cache of ours."""
    if not _UNTOLD:
        return None, None
    if torch.compiler.is_compiling():
        return cast("tuple[Latents | None, Any]", torch.compiler.disable(_told)(key))
    return _told(key)


def _told(key: Tensor) -> tuple[Latents | None, Any]:
    latents = _told_once(_BEHIND, key)
    return latents, _told_once(_CACHED, key if latents is None else latents.latent)


def _note(where: WeakTensorKeyDictionary, key: Tensor, what: Any) -> None:
    where[key] = what
    _UNTOLD.append(None)


def _told_once(where: WeakTensorKeyDictionary, key: Tensor) -> Any:
    found = where.pop(key, None)
    if found is not None:
        _UNTOLD.pop()
    return found


def lead_through() -> None:
    """From here on the method asks where it is called; once for a class that somebody imported."""
    if torch.compiler.is_compiling():
        return
    for file in _FILES:
        for kind in tuple(vars(sys.modules[file]).values()) if file in sys.modules else ():
            theirs = vars(kind).get(_METHOD) if isinstance(kind, type) else None
            if callable(theirs) and not hasattr(theirs, "called_in_usp"):
                setattr(kind, _METHOD, _led(theirs))


def _led(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def called(module: Any, latent: Tensor, rope_key: Tensor) -> Any:
        if torch.compiler.is_compiling() or not _is_wanted(module, latent, rope_key):
            return theirs(module, latent, rope_key)
        weight, heads = _weight(module.kv_b_proj), module.num_heads
        dims = module.qk_nope_head_dim, module.v_head_dim
        up_k, up_v = weight.view(heads, sum(dims), -1).split(dims, 1)
        one = latent.new_empty(())
        shape = latent.shape[0], heads, latent.shape[2]
        key, value = one.expand(*shape, dims[0] + rope_key.shape[-1]), one.expand(*shape, dims[1])
        opened = lambda: theirs(module, latent, rope_key)  # noqa: E731
        _note(_BEHIND, key, Latents(latent, rope_key, up_k, up_v, opened))
        return key, value

    called.called_in_usp = True  # type: ignore[attr-defined]
    return called


def _is_wanted(module: Any, latent: Tensor, rope_key: Tensor) -> bool:
    """Whether latents are kept as they are. Where an adapter drops some of what it takes, in
    training, no weight says what it makes of them."""
    if module.config._attn_implementation != NAME:
        return False
    if module.training and not _is_plain(module.kv_b_proj):
        return False
    if latent in _CACHED:
        return True
    region = current_region()
    if region is None or len(region.tokens.shares) == 1:
        return False
    mesh = region.tokens.spread.mesh
    rows = 1 if mesh is None else mesh.ulysses_degree
    numbers = module.num_heads * (module.qk_nope_head_dim + rope_key.shape[-1] + module.v_head_dim)
    return (latent.shape[-1] + rope_key.shape[-1]) * rows < numbers


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a product with its weight, and nothing more."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is nn.Linear and not hooks and type(layer.weight) is nn.Parameter


def _weight(layer: Any) -> Tensor:
    """(features, C) of a linear map, which may have an adapter beside its weight."""
    if _is_plain(layer):
        return cast(Tensor, layer.weight)
    width, weight = layer.in_features, layer.weight
    return cast(Tensor, layer(torch.eye(width, dtype=weight.dtype, device=weight.device)).mT)
