"""How tensors of a block are handed to a kernel for one call, and its answers taken back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from usp.backends.library.call import How, Packed
from usp.backends.library.tiles import Group, Places, ends
from usp.planning.problem import Block, Scoring


@dataclass(frozen=True)
class Side:
    """The queries or the keys of a call.

    Several runs are sequences of their own: stacked as samples where they are of one length, packed
    one behind the other in a tensor without a batch dim where the kernel takes that.

    Attributes:
        places: Which of the block's.
        turned: Whether each run goes in from its last to its first.
        packed: Whether they are packed.
        batch: B.
    """

    places: Places
    turned: bool
    packed: bool
    batch: int

    def given(self, x: Tensor) -> Tensor:
        """Of (B, L, H, D): (B, n, H, D), (B runs, n, H, D) stacked, (B n, H, D) packed."""
        x = self.places.of(x, 1)
        if self.packed:
            return (x.flip(1) if self.turned else x).flatten(0, 1)
        x = x if self.runs == 1 else x.unflatten(1, (self.runs, -1)).flatten(0, 1)
        return x.flip(1) if self.turned else x

    def taken(self, x: Tensor) -> Tensor:
        """The way back: (B, n, H, D)."""
        if self.packed:
            x = x.unflatten(0, (self.batch, -1))
            return x.flip(1) if self.turned else x
        x = x.flip(1) if self.turned else x
        return x if self.runs == 1 else x.unflatten(0, (self.batch, -1)).flatten(1, 2)

    @property
    def runs(self) -> int:
        return len(self.places.runs)

    @property
    def lengths(self) -> list[int]:
        """Of the runs, in the order in which they go in packed."""
        return self.places.lengths[::-1] if self.turned else self.places.lengths


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        lse_lies: How the LSE of a packed call lies: "hn" (heads, tokens), "nh"; None for a kernel
            without such calls.
    """

    group: Group
    batch: int
    scoring: Scoring
    device: torch.device
    lse_lies: str | None

    @property
    def packed(self) -> bool:
        return len(self.group.rectangles) > 1 and self.lse_lies is not None

    def is_all_of(self, block: Block) -> bool:
        """Whether it takes every query and every key of the block."""
        sides = (self.group.rows, block.q.shape[1]), (self.group.keys, block.k.shape[1])
        return all(places.adjoin and places.around == slice(0, n) for places, n in sides)

    @cached_property
    def rows(self) -> Side:
        return Side(self.group.rows, self.group.turned, self.packed, self.batch)

    @cached_property
    def keys(self) -> Side:
        return Side(self.group.keys, self.group.turned, self.packed, self.batch)

    @cached_property
    def how(self) -> How:
        left, right, _ = self.group.kind
        packed = self._packed() if self.packed else None
        return How(self.scoring.softmax_scale, left, right, self.scoring.softcap, packed)

    def _packed(self) -> Packed:
        key = self.device, self.batch
        kept = self.group.packed
        if key not in kept:
            sides = self.rows, self.keys
            begins = (torch.tensor(ends(s.lengths, self.batch), dtype=torch.int32) for s in sides)
            cu_q, cu_k = (x.to(self.device) for x in begins)
            # two at least: flash-attn 2 and its kin have another way with single rows, where heads
            # and sequences change places in the LSE
            max_q, max_k = (max(2, *s.lengths) for s in sides)
            kept[key] = Packed(cu_q, cu_k, max_q, max_k)
        return kept[key]

    def given_lse(self, lse: Tensor) -> Tensor:
        """Of (B, H, Lq) what these rows have, contiguous and fp32: it is read by its pointer."""
        lse = self.rows.given(lse.transpose(1, 2)[..., None])[..., 0]  # (..., n, H)
        if not self.packed or self.lse_lies == "hn":
            lse = lse.transpose(-1, -2)
        return lse.to(torch.float32).contiguous()

    def taken_lse(self, lse: Tensor) -> Tensor:
        """The way back: (B, H, n)."""
        if not self.packed or self.lse_lies == "hn":
            lse = lse.transpose(-1, -2)
        return self.rows.taken(lse[..., None])[..., 0].transpose(1, 2)
