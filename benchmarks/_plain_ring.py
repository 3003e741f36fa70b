"""Ring attention written with torch alone, the way the field writes it: what usp is measured by.

Each hop sends K and V as two messages, computes torch's own partial (out, lse) of the block at
hand and merges it in Python in fp32; backward, fp32 dK and dV travel behind their block. Causal
attention is in zigzag order: rank r of R holds chunks r and 2R - 1 - r of 2R, so that a block of
an earlier rank is seen by its first half and one of a later rank by the second half of the queries.

Source:
    Ring attention: arXiv:2310.01889.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def plain_ring_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Exact attention of this rank's queries over the keys of every rank of the world.

    Args:
        q, k, v: (B, H, L, D), equally long on all ranks; an even L if causal.
        causal: Whether the ranks hold zigzag chunks of a causal sequence, or any of a full one.
    """
    return cast(Tensor, cast(Any, _PlainRing).apply(q, k, v, causal))


def pass_on(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Send to the next rank, receive from the one before; one message for each tensor."""
    rank, size = dist.get_rank(), dist.get_world_size()
    arriving = [torch.empty_like(tensor) for tensor in tensors]
    ops = [dist.P2POp(dist.isend, tensor, (rank + 1) % size) for tensor in tensors]
    ops += [dist.P2POp(dist.irecv, tensor, (rank - 1) % size) for tensor in arriving]
    works = dist.batch_isend_irecv(ops)

    def wait() -> list[Tensor]:
        for work in works:
            work.wait()
        return arriving

    return wait


@dataclass(frozen=True)
class Hop:
    """What this rank computes with the block that came `step` ranks along the ring."""

    queries: slice
    keys: slice
    causal: bool

    @classmethod
    def of(cls, step: int, length: int, causal: bool) -> Hop:
        half, whole = length // 2, slice(0, length)
        if not causal or step == 0:
            return cls(whole, whole, causal)
        if step <= dist.get_rank():  # the block of an earlier rank
            return cls(whole, slice(0, half), False)
        return cls(slice(half, length), whole, False)


class _PlainRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        ctx.causal, held, size = causal, [k, v], dist.get_world_size()
        for step in range(size):
            if step + 1 < size:
                wait = pass_on(held)
            hop = Hop.of(step, q.shape[2], causal)
            block_k, block_v = (x[:, :, hop.keys] for x in held)
            part = _forward(q[:, :, hop.queries], block_k, block_v, 0.0, hop.causal)
            if step == 0:
                out, lse = part[0].float(), part[1]
            else:
                _merge(out[:, :, hop.queries], lse[:, :, hop.queries], *part)
            if step + 1 < size:
                held = wait()
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        held, size = [k, v], dist.get_world_size()
        dq = torch.zeros_like(q, dtype=torch.float32)
        sums: Callable[[], list[Tensor]] | None = None
        for step in range(size):
            if step + 1 < size:
                wait = pass_on(held)
            hop = Hop.of(step, q.shape[2], ctx.causal)
            rows = [x[:, :, hop.queries] for x in (dout, q)]
            block = [x[:, :, hop.keys] for x in held]
            state = [x[:, :, hop.queries] for x in (out, lse)]
            block_dq, *block_dkv = _backward(*rows, *block, *state, 0.0, hop.causal)
            dq[:, :, hop.queries] += block_dq
            if sums is None:
                dkv = [part.float().contiguous() for part in block_dkv]
            else:
                dkv = sums()
                for total, part in zip(dkv, block_dkv, strict=True):
                    total[:, :, hop.keys] += part
            sums = pass_on(dkv)
            if step + 1 < size:
                held = wait()
        assert sums is not None
        return dq.to(q.dtype), *(total.to(k.dtype) for total in sums()), None


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Lets one block's result into the fp32 state, in place: (B, H, L, D) and (B, H, L)."""
    difference = (part_lse - lse)[..., None]
    out -= torch.sigmoid(difference) * (out - part)
    lse -= F.logsigmoid(lse - part_lse)
