"""How tensors of a block are handed to a kernel for one call, and its answers taken back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from usp.backends.library.call import How, Packed
from usp.backends.library.tiles import Group, Places, ends
from usp.planning.problem import Scoring


@dataclass(frozen=True)
class Side:
    """The queries or the keys of a call.

    Attributes:
        places: Which of the block's.
        turned: Whether they go in from the last to the first.
        packed: Whether each run is a sequence of its own, in a tensor without a batch dim.
        batch: B.
    """

    places: Places
    turned: bool
    packed: bool
    batch: int

    def given(self, x: Tensor) -> Tensor:
        """Of (B, L, H, D): (B, n, H, D), or (B n, H, D) packed."""
        x = self.places.of(x, 1)
        x = x.flip(1) if self.turned else x
        return x.flatten(0, 1) if self.packed else x

    def taken(self, x: Tensor) -> Tensor:
        """The way back: (B, n, H, D)."""
        x = x.unflatten(0, (self.batch, -1)) if self.packed else x
        return x.flip(1) if self.turned else x

    @property
    def lengths(self) -> list[int]:
        """Of the runs, in the order in which they go in."""
        return self.places.lengths[::-1] if self.turned else self.places.lengths


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        lse_lies: How the LSE of a packed call lies: "hn" (heads, tokens), "nh"; None without any.
    """

    group: Group
    batch: int
    scoring: Scoring
    device: torch.device
    lse_lies: str | None

    @property
    def packed(self) -> bool:
        return len(self.group.rectangles) > 1

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
            kept[key] = Packed(cu_q, cu_k, *(max(s.lengths) for s in sides))
        return kept[key]

    def given_lse(self, lse: Tensor) -> Tensor:
        """Of (B, H, Lq) what these rows have, contiguous and fp32: it is read by its pointer."""
        lse = self.group.rows.of(lse, 2)
        lse = lse.flip(2) if self.group.turned else lse
        if self.packed:
            dims = (1, 0, 2) if self.lse_lies == "hn" else (0, 2, 1)
            lse = lse.permute(dims)
            lse = lse.flatten(1, 2) if self.lse_lies == "hn" else lse.flatten(0, 1)
        return lse.to(torch.float32).contiguous()

    def taken_lse(self, lse: Tensor) -> Tensor:
        """The way back: (B, H, n)."""
        if self.packed and self.lse_lies == "hn":
            lse = lse.unflatten(1, (self.batch, -1)).permute(1, 0, 2)
        elif self.packed:
            lse = lse.unflatten(0, (self.batch, -1)).permute(0, 2, 1)
        return lse.flip(2) if self.group.turned else lse
