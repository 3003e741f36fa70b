"""Blocks that travel as latents: each rank makes keys and values of what arrives.

A transport is wrapped in another one, so the ring's loop knows nothing of it: blocks are opened as
they come, and gradients of their keys and values folded into those of the latents and of the
up-projections before they go home.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from usp.attention.ring import Ring
from usp.distributed.transport import Parts, Sums, Transport
from usp.planning.samples import Samples


@dataclass(frozen=True, eq=False)
class UpProjections:
    """Those of the heads held here.

    Attributes:
        key: (h, D - Dr, C). value: (h, Dv, C).
        head_dim: D; the last Dr dims of a key are the rotary ones, which all heads share.
    """

    key: Tensor
    value: Tensor
    head_dim: int

    def opened(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, n, h, D) and values (B, n, h, Dv) of latents (B, n, C + Dr)."""
        (batch, length, _), (heads, dim, width) = latent.shape, self.key.shape
        k = latent.new_empty((batch, length, heads, self.head_dim))
        if not heads:  # nor have latents come
            return k, latent.new_empty((batch, length, 0, self.value.shape[1]))
        compressed, rope = latent[..., :width], latent[..., width:]
        k[..., :dim] = torch.einsum("bnc,hdc->bnhd", compressed, self.key)
        k[..., dim:] = rope[:, :, None]
        return k, torch.einsum("bnc,hdc->bnhd", compressed, self.value)

    def fold(
        self, latent: Tensor, dk: Tensor, dv: Tensor, into: Tensor, sums: UpProjections
    ) -> None:
        """Add the gradients of a block.

        Args:
            latent: (B, n, C + Dr), of the block.
            dk, dv: Of what it was opened to, in the dtype of the state.
            into: (B, n, C + Dr) gradients of the latents.
            sums: Gradients of the up-projections.
        """
        heads, dim, width = self.key.shape
        if not heads:
            return
        compressed = latent[..., :width].to(dk.dtype)
        into[..., width:] += dk[..., dim:].sum(2)
        both = (dk[..., :dim], self.key, sums.key), (dv, self.value, sums.value)
        for gradient, weight, total in both:
            gradient = gradient.to(into.dtype)
            into[..., :width] += torch.einsum("bnhd,hdc->bnc", gradient, weight.to(into.dtype))
            total += torch.einsum("bnhd,bnc->hdc", gradient, compressed)


class LatentTransport:
    """Latents along any transport, opened where they come.

    Attributes:
        gradient: (B, L, C + Dr) of this rank's latents, in the dtype of the state.
        sums: Of the up-projections.
    """

    def __init__(
        self,
        inner: Transport,
        up: UpProjections,
        latent: Tensor,
        mask: Tensor | None,
        parts: list[Samples],
        dtype: torch.dtype,
    ):
        self.inner, self.up = inner, up
        travelling = [latent] if mask is None else [latent, mask]
        self.latents = self.held = [[each.of(x) for x in travelling] for each in parts]
        self.gradient = torch.zeros(latent.shape, dtype=dtype, device=latent.device)
        self.totals = [[each.of(self.gradient)] for each in parts]
        key, value = (torch.zeros_like(x, dtype=dtype) for x in (up.key, up.value))
        self.sums_of_up = UpProjections(key, value, up.head_dim)

    def blocks(self, own: Parts) -> Iterator[Parts]:
        """The own block as it was opened before, then those that come."""
        for index, held in enumerate(self.inner.blocks(self.latents)):
            self.held = held
            yield [[*self.up.opened(x), *mask] for x, *mask in held] if index else own

    def sums(self, own: Parts) -> Sums:
        return _LatentSums(self)

    def fold(self, latents: Parts, gradients: Parts, into: Parts) -> None:
        """Add gradients of keys and values of a block to those of its latents."""
        for (latent, *_), (dk, dv), (total,) in zip(latents, gradients, into, strict=True):
            self.up.fold(latent, dk, dv, total, self.sums_of_up)


class _LatentSums:
    def __init__(self, transport: LatentTransport):
        self._transport = transport
        self._inner = transport.inner.sums(transport.totals)

    def fresh(self) -> Parts:
        self._zeros, up = self._inner.fresh(), self._transport.up
        self._opened = [
            [
                x.new_zeros((*x.shape[:2], len(up.key), width))
                for width in (up.head_dim, up.value.shape[1])
            ]
            for (x,) in self._zeros
        ]
        return self._opened

    def pass_on(self) -> None:
        self._transport.fold(self._transport.held, self._opened, self._zeros)
        self._inner.pass_on()

    def home(self, own: Parts) -> None:
        transport = self._transport
        transport.fold(transport.latents, own, transport.totals)
        self._inner.home(transport.totals)


@dataclass(frozen=True, eq=False)
class LatentRing(Ring):
    """A ring along which latents travel."""

    latents: LatentTransport | None = None

    @property
    def transport(self) -> Transport:
        assert self.latents is not None
        return self.latents
