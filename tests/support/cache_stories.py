"""What happens to a cache, told once for the workers that live it and the oracle that judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from usp.testing import dense_attention


@dataclass(frozen=True)
class Story:
    """A cache and what comes to it.

    Attributes:
        events: ("extend", tokens, layout), ("append", tokens), ("crop", length) or
            ("select", samples). After each that brings tokens, these attend.
        attends: Whether a chunk that is cut attends as it is cut.
        latent: Whether values are the first dims of the keys.
    """

    events: tuple[tuple[Any, ...], ...]
    batch: int = 1
    heads: int = 3
    kv_heads: int = 1
    dim: int = 5
    value_dim: int = 3
    latent: bool = False
    window: int | None = None
    first_keys: int = 0
    padding: tuple[int, ...] = ()
    page: int = 2
    sinks: bool = False
    slopes: bool = False
    attends: bool = False
    dtype: str = "float64"
    seed: int = 0

    def new(self, tokens: int, event: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """q, k, v of the tokens of an event."""
        torch.manual_seed(1000 * self.seed + event)
        dtype = getattr(torch, self.dtype)
        q = torch.randn(self.batch, tokens, self.heads, self.dim, dtype=torch.float64)
        k = torch.randn(self.batch, tokens, self.kv_heads, self.dim, dtype=torch.float64)
        v = torch.randn(self.batch, tokens, self.kv_heads, self.value_dim, dtype=torch.float64)
        return q.to(dtype), k.to(dtype), None if self.latent else v.to(dtype)

    @property
    def options(self) -> dict[str, Any]:
        """Of ``decode_attention``."""
        torch.manual_seed(self.seed)
        some = torch.randn(2, self.heads, dtype=torch.float64)
        found: dict[str, Any] = {"sinks": some[0]} if self.sinks else {}
        return found | ({"alibi_slopes": some[1].abs()} if self.slopes else {})

    def told(self) -> list[tuple[Tensor, Tensor]]:
        """(out, lse) of each event that brings tokens, by dense attention in fp64."""
        found, padding, keys, values = [], list(self.padding or [0] * self.batch), None, None
        samples = list(range(self.batch))
        for number, (kind, n, *_) in enumerate(self.events):
            if kind == "select":
                samples = [samples[i] for i in n]
                keys, values = keys[list(n)], values[list(n)]
            elif kind == "crop":
                keys, values = keys[:, :n], values[:, :n]
            else:
                q, k, v = (None if x is None else x[samples] for x in self.new(n, number))
                v = k[..., : self.value_dim] if v is None else v
                keys = k if keys is None else torch.cat((keys, k), 1)
                values = v if values is None else torch.cat((values, v), 1)
                found.append(self._dense(q, keys, values, [padding[i] for i in samples]))
        return found

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, padding: list[int]) -> tuple[Tensor, Tensor]:
        first = k.shape[1] - q.shape[1]
        i = torch.arange(first, k.shape[1])[None, :, None]
        j, pad = torch.arange(k.shape[1])[None, None], torch.tensor(padding)[:, None, None]
        seen = (j <= i) & (j >= pad)
        if self.window is not None:
            seen &= (j >= i - self.window) | (j < pad + self.first_keys)
        return dense_attention(
            q, k, v, attn_mask=seen[:, None], query_offset=first, **self.options
        )  # fmt: skip


def lived(story: Story, mesh: Any) -> list[tuple[Tensor, Tensor, tuple[int, ...]]]:
    """(out, lse) of each event that brings tokens, and what each rank held then."""
    import usp

    cache = usp.ShardedCache(
        mesh,
        window=story.window,
        first_keys=story.first_keys,
        padding=story.padding or None,
        value_dim=story.value_dim if story.latent else None,
        page=story.page,
    )
    found, samples = [], list(range(story.batch))
    for number, (kind, n, *more) in enumerate(story.events):
        if kind == "crop":
            cache.crop(n)
            continue
        if kind == "select":
            cache, samples = cache.select(n), [samples[i] for i in n]
            continue
        q, k, v = (None if x is None else x[samples] for x in story.new(n, number))
        cut = {}
        if kind == "append":
            cache.append(k, v)
        else:
            mine = [
                None if x is None else usp.shard_sequence(x, mesh, dim=1, layout=more[0])
                for x in (k, v)
            ]
            cache.extend(*mine, layout=more[0], seq_len=n)
            if story.attends:
                cut = {"layout": more[0], "seq_len": n}
                q = usp.shard_sequence(q, mesh, dim=1, layout=more[0])
        options = story.options | cut
        out, lse = usp.decode_attention(q, cache, mesh, return_lse=True, **options)
        if cut:
            named = {"layout": cut["layout"], "seq_len": n}
            out = usp.unshard_sequence(out, mesh, dim=1, **named)
            lse = usp.unshard_sequence(lse, mesh, dim=2, **named)
        assert cache.k.shape[1] == cache.layout.counts[0 if mesh is None else mesh.rank]
        found.append((out, lse, cache.layout.counts))
    return found
