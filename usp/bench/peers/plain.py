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
from torch import Tensor

from usp.bench.case import Case
from usp.bench.libraries import CPU, FLASH, Library, eager_merge
from usp.planning.problem import State

NAME = "plain torch ring"


def unavailable() -> str | None:
    return None


def reason_against(case: Case, size: int) -> str | None:
    if case.mask not in ("full", "causal"):
        return f"it knows no {case.mask}"
    if case.group > 1:
        return "torch's partial attention takes as many key heads as query heads"
    if case.length % (2 * size):
        return f"{case.length} tokens do not divide by {2 * size}"
    return None


def positions(case: Case, rank: int, size: int) -> Tensor:
    if not case.is_causal:
        return torch.arange(case.length).view(size, -1)[rank]
    return torch.arange(case.length).view(2 * size, -1)[[rank, 2 * size - 1 - rank]].flatten()


def make(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        library = FLASH if q.is_cuda else CPU
        return cast(Tensor, cast(Any, _PlainRing).apply(q, k, v, case.is_causal, library))

    return attend


def pass_on(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Send to the next rank, receive from the one before; one message for each tensor."""
    rank, size = dist.get_rank(), dist.get_world_size()
    tensors = [tensor.contiguous() for tensor in tensors]
    arriving = [torch.empty_like(tensor) for tensor in tensors]
    ops = [dist.P2POp(dist.isend, tensor, (rank + 1) % size) for tensor in tensors]
    ops += [dist.P2POp(dist.irecv, tensor, (rank - 1) % size) for tensor in arriving]
    works = dist.batch_isend_irecv(ops) if size > 1 else []
    if size == 1:
        arriving = tensors

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
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, library: Library
    ) -> Tensor:
        held, size, kept_of = [k, v], dist.get_world_size(), []
        for step in range(size):
            if step + 1 < size:
                wait = pass_on(held)
            hop = Hop.of(step, q.shape[1], causal)
            part, part_lse, kept = library.forward(
                q[:, hop.queries], held[0][:, hop.keys], held[1][:, hop.keys], hop.causal
            )
            kept_of.append(kept)
            if step == 0:
                out, lse = part.float().clone(), part_lse.float().clone()
            else:
                rows = State(out[:, hop.queries], lse[:, :, hop.queries])
                eager_merge(rows, part, part_lse)
            if step + 1 < size:
                held = wait()
        result = out.to(q.dtype)
        ctx.causal, ctx.library, ctx.kept_of = causal, library, kept_of
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
            hop = Hop.of(step, q.shape[1], ctx.causal)
            rows = [x[:, hop.queries] for x in (dout, q)]
            block = [x[:, hop.keys] for x in held]
            state = out[:, hop.queries], lse[:, :, hop.queries].contiguous()
            kept = ctx.kept_of[step]
            block_dq, *block_dkv = ctx.library.backward(*rows, *block, *state, hop.causal, kept)
            dq[:, hop.queries] += block_dq
            if sums is None:
                dkv = [part.float().contiguous() for part in block_dkv]
            else:
                dkv = sums()
                for total, part in zip(dkv, block_dkv, strict=True):
                    total[:, hop.keys] += part
            sums = pass_on(dkv)
            if step + 1 < size:
                held = wait()
        assert sums is not None
        return dq.to(q.dtype), *(total.to(k.dtype) for total in sums()), None, None
