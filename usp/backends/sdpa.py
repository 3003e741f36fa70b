"""torch's own CPU flash attention, through the aten ops that return an LSE.

It takes full or causal rectangles: a visit is cut into tiles, a band that is neither gets the
boolean mask of a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from usp.planning.problem import Block, Gradients, Saved, Traits, state_dtype
from usp.planning.visit import Tile

NAME = "sdpa"
CARRIES_STATE = False
OVERWRITES = False
_MASKED_ROWS = 512


def unavailable() -> str | None:
    return None


def reasons_against(traits: Traits) -> tuple[str, ...]:
    reasons = []
    if traits.device_type != "cpu":
        reasons.append(f"it runs torch's CPU kernel, the tensors are on {traits.device_type}")
    if traits.head_dim != traits.value_head_dim:
        reasons.append(f"head_dim {traits.head_dim} and v's {traits.value_head_dim} must be equal")
    if traits.softmax_scale <= 0:
        reasons.append(
            f"it hides keys before it scales, which softmax_scale {traits.softmax_scale} undoes"
        )
    if traits.bias:
        reasons.append("a bias or key padding mask can hide a whole row, whose LSE it gives as 0")
    if traits.returns_lse:
        reasons.append("its backward takes no gradient of the LSE")
    for name in ("softcap", "alibi", "dropout"):
        if getattr(traits, name):
            reasons.append(f"it has no {name}")
    return tuple(reasons)


def attention_partials(block: Block) -> Iterator[tuple[slice, Tensor, Tensor]]:
    q, k, v = _heads_first(block)
    for tile in _calls(block):
        rows, keys = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, rows],
            k[:, :, keys],
            v[:, :, keys],
            0.0,
            _is_causal(tile),
            attn_mask=_band(tile, q),
            scale=block.scoring.softmax_scale,
        )
        yield rows, out.transpose(1, 2), lse


def attention_backward(block: Block, saved: Saved, grads: Gradients) -> None:
    q, k, v = _heads_first(block)
    dout, out = (x.transpose(1, 2).to(q.dtype) for x in (saved.dout, saved.out))
    kv_index = block.heads.kv_index
    to_kv = None if _is_identity(kv_index) else torch.tensor(kv_index, device=k.device)
    for tile in _calls(block):
        rows, keys = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout[:, :, rows],
            q[:, :, rows],
            k[:, :, keys],
            v[:, :, keys],
            out[:, :, rows],
            saved.lse[:, :, rows],
            0.0,
            _is_causal(tile),
            attn_mask=_band(tile, q),
            scale=block.scoring.softmax_scale,
        )
        grads.dq[:, rows] += dq.transpose(1, 2)
        for total, found in ((grads.dk[:, keys], dk), (grads.dv[:, keys], dv)):
            if to_kv is None:
                total += found.transpose(1, 2)
            else:
                total.index_add_(2, to_kv, found.transpose(1, 2))


def _heads_first(block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, L, D) each; the op wants a key head for every query head.

    In the dtype of the state: in 16 bits the op would round each partial result, an error that
    grows with the ring, and it is no faster.
    """
    dtype, index, k, v = state_dtype(block.q.dtype), block.heads.kv_index, block.k, block.v
    if not _is_identity(index):
        read = torch.tensor(index, device=k.device)
        k, v = k.index_select(2, read), v.index_select(2, read)
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (block.q, k, v))
    return q, k, v


def _is_identity(kv_index: tuple[int, ...]) -> bool:
    """Whether each query head has a key head of its own."""
    return kv_index == tuple(range(len(kv_index)))


def _is_causal(tile: Tile) -> bool:
    return tile.lo is None and tile.hi == 0


def _calls(block: Block) -> Iterator[Tile]:
    """The visit's tiles, cut further until each is full, causal or a few masked rows."""
    for tile in block.visit.tiles:
        if tile.lo is None and tile.hi is not None and tile.hi > 0:
            # Keys below the diagonal's start are open to every row of the tile.
            yield replace(tile, k1=tile.k0 + tile.hi, hi=None)
            yield replace(tile, k0=tile.k0 + tile.hi, hi=0)
        elif tile.lo is None:
            yield tile
        else:
            yield from _masked(tile)


def _masked(tile: Tile) -> Iterator[Tile]:
    """Runs of rows of a banded tile, each with just the keys inside its part of the band."""
    assert tile.lo is not None
    for start in range(0, tile.q1 - tile.q0, _MASKED_ROWS):
        stop = min(start + _MASKED_ROWS, tile.q1 - tile.q0)
        k0 = tile.k0 + tile.lo + start
        k1 = tile.k1 if tile.hi is None else min(tile.k1, tile.k0 + tile.hi + stop)
        hi = None if tile.hi is None else tile.hi - tile.lo
        yield Tile(tile.q0 + start, tile.q0 + stop, k0, k1, 0, hi)


def _band(tile: Tile, q: Tensor) -> Tensor | None:
    """(rows, keys) additive mask of a banded tile, None for a full or causal one."""
    if tile.lo is None:
        return None
    i = torch.arange(tile.q1 - tile.q0, device=q.device)[:, None]
    j = torch.arange(tile.k1 - tile.k0, device=q.device)[None]
    seen = j - i >= tile.lo
    if tile.hi is not None:
        seen &= j - i <= tile.hi
    return torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
