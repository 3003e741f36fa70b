"""A cache of transformers whose keys and values are cut over the ranks of a mesh."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from usp.distributed.mesh import SequenceMesh, check_mesh
from usp.integrations._answer import Tokens
from usp.integrations._region import current_region
from usp.integrations._transformers_latents import Latents, lead_through, note_cached
from usp.integrations._transformers_masks import Described
from usp.integrations._transformers_states import StatesLayer, check_spread
from usp.masks import Mask
from usp.nn.cache import ShardedCache
from usp.nn.decoding import decode_attention
from usp.planning.masks.mask import Intersection
from usp.planning.masks.terms import Interval


class OfMesh:
    """What marks the caches of this door.

    Attributes:
        waiting: The layer whose keys have come and whose attention has not.
    """

    waiting: Layer | None = None
    new_states: Callable[[], Any]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """What a layer of linear attention asks first for, and so begins with."""
        layers = cast("list[Any]", cast(Any, self).layers)
        if len(layers) == layer_idx:
            layers.append(self.new_states())
        return cast("Tensor | None", cast(Any, super()).get_conv_state(layer_idx, state_idx))


class Layer:
    """One layer, with the methods that transformers asks for."""

    is_sliding = False  # one mask is made for all, which says the window
    is_croppable = True

    def __init__(self, cache: OfMesh, mesh: SequenceMesh | None) -> None:
        super().__init__()
        self.cache, self.mesh, self.is_initialized = cache, mesh, True
        self.held = ShardedCache(mesh)
        self.is_read = False
        self._new: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first keys say what is held."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys (B, G, tokens, D) and values: this rank's, where tokens are spread.

        Returns:
            They themselves: attention to the others goes by the cache.
        """
        if self.cache.waiting is not None:
            raise NotImplementedError(
                "what a layer keeps came to a sharded cache, and its attention did not look "
                'there: load the model with attn_implementation="usp"; models that keep latents '
                "and make keys of them in a way that is not known here can do it with "
                "usp.decode_attention"
            )
        self._new = key_states, value_states
        self.cache.waiting = self
        note_cached(key_states, self)
        return key_states, value_states

    def keep(self, latents: Latents | None) -> None:
        """What has come a moment ago, which is keys and values, or what these are made of."""
        assert self._new is not None
        k: Tensor = self._new[0].transpose(1, 2)
        v: Tensor | None = self._new[1].transpose(1, 2)
        self._new, self.cache.waiting, region = None, None, current_region()
        if latents is not None:
            if not self.held.length:
                width = latents.latent.shape[-1]
                self.held = ShardedCache(self.mesh, value_dim=width, page=self.held.page)
            k, v = latents.together, None
        if region is None:
            self.held.append(k, v)
        else:
            self._extend(k, v, region.tokens)

    def _extend(self, k: Tensor, v: Tensor | None, tokens: Tokens) -> None:
        spread = tokens.spread
        check_spread(tokens, self.mesh, f"{self.held.length}" if self.held.length else "")
        self.held.extend(k, v, spread.layout, spread.seq_len, spread.validate)

    def read(self, mask: Described | Tensor | None, hint: bool) -> None:
        """What a mask says of those that come later: the window, and padding on the left.

        Raises:
            NotImplementedError: it says something else; names it.
        """
        window: int | None = None
        padding: tuple[int, ...] = ()
        if mask is None and hint:
            pass  # causal
        elif isinstance(mask, Described) and mask.documents is None:
            window, padding = _window(mask.mask), _left_padding(mask.padding)
        else:
            what = "none" if mask is None else type(mask).__name__
            raise NotImplementedError(
                f"a mask that is {what} beside a sharded cache: causal, sliding windows and "
                "padding on the left are known (a 2-D attention_mask)"
            )
        told = window, padding or self.held.padding
        if self.is_read and told != (self.held.window, self.held.padding):
            raise NotImplementedError(
                f"a window of {told[0]} and padding of {told[1]} tokens, where the cache began "
                f"with {self.held.window} and {self.held.padding}: begin with an empty cache"
            )
        self.held.window, self.held.padding = told
        self.is_read = True

    def attend(self, query: Tensor, latents: Latents | None, options: dict[str, Any]) -> Tensor:
        """The last tokens' attention, (B, H, tokens, D) -> (B, tokens, H, Dv); the same on every
        rank.

        Args:
            latents: Of these tokens, where the cache keeps latents.
            options: Of ``decode_attention``, and ``dropout_p``.
        """
        options, q = dict(options), query.transpose(1, 2)
        if options.pop("dropout_p"):
            raise NotImplementedError("dropout beside a cache: call model.eval() first")
        if latents is None:
            return cast(Tensor, decode_attention(q, self.held, self.mesh, **options))
        if options["softmax_scale"] is None:
            options["softmax_scale"] = q.shape[-1] ** -0.5
        q = latents.lowered(q)
        return latents.raised(cast(Tensor, decode_attention(q, self.held, self.mesh, **options)))

    def get_seq_length(self) -> int:
        return self.held.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask is made for, dropped ones too, and the position of the first."""
        return self.held.length + query_length, 0

    def reset(self) -> None:
        self.held, self.is_read, self._new = ShardedCache(self.mesh), False, None

    def crop(self, tokens_to_remove: int) -> None:
        """Without the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a number of 0 or less, got {tokens_to_remove}")
        self.held.crop(self.held.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.arange(self.held.k.shape[0], device=indices.device)[indices].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([i for i in range(self.held.k.shape[0]) for _ in range(repeats)])

    def _select(self, samples: list[int]) -> None:
        self.held = self.held.select(samples)

    def offload(self) -> None:
        raise NotImplementedError("a sharded cache stays on its device: pass offloading=False")

    prefetch = offload


def _window(mask: Mask | None) -> int | None:
    parts = mask.masks if isinstance(mask, Intersection) else (mask,)
    known = [part for part in parts if isinstance(part, Interval) and part.right in (0, None)]
    if len(known) == len(parts) and any(part.right == 0 for part in known):
        return min((part.left for part in known if part.left is not None), default=None)
    raise NotImplementedError(
        f"a mask of {mask or 'a function that is not known'} beside a sharded cache: causal ones "
        "and sliding windows are known"
    )


def _left_padding(real: Tensor | None) -> tuple[int, ...]:
    """Of (B, keys), True where a key is no padding; () where none is."""
    if real is None or bool(real.all()):
        return ()
    padding = (~real).sum(1)
    left = torch.arange(real.shape[1], device=real.device) >= padding[:, None]
    if not torch.equal(left, real):
        raise NotImplementedError(
            "padding that is not on the left of a text beside a cache, behind which new tokens "
            "come: pad on the left (tokenizer.padding_side)"
        )
    return tuple(padding.tolist())


@cache
def _classes() -> tuple[Any, Any, Any]:
    """Of caches, and of layers of both kinds, made of those of transformers."""
    from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

    return (
        type("ShardedCache", (OfMesh, Cache), {}),
        type("ShardedLayer", (Layer, CacheLayerMixin), {}),
        type("StatesLayer", (StatesLayer, LinearAttentionLayer), {}),
    )


def sharded_cache(mesh: SequenceMesh | None) -> Any:
    """A ``Cache`` of transformers, each token's keys and values on one rank of the mesh.

    For ``model.generate(ids, cache=...)`` of a model with ``attn_implementation="usp"``, on every
    rank with the same tokens and, where it samples, the same seed: every rank gets the tokens that
    one device would. A model that ``usp.parallelize`` has spread computes the prompt as it is
    spread, and each rank keeps its shard; tokens that come later are computed on every rank. They
    attend by ``usp.decode_attention``, in layers with a window and sinks, too. Layers of linear
    attention keep a state and a window of their convolution, the same on every rank.

    Args:
        mesh: That of ``parallelize``; None is one device.
    """
    lead_through()
    whole, layer, states = _classes()
    check_mesh(mesh)
    made = whole(layers=[])
    made.layer_class_to_replicate = partial(layer, made, mesh)
    made.new_states = partial(states, mesh)
    return made


def decodes(kwargs: dict[str, Any]) -> bool:
    """Whether a model is called with a cache of ours that holds tokens already."""
    given = kwargs.get("cache", kwargs.get("past_key_values"))
    return isinstance(given, OfMesh) and cast(Any, given).get_seq_length() > 0
