"""The executor where every rank holds all queries: each computes them against its own keys, and
what they found is merged on all of them.

A piece of their rows (a head of a query each) is merged by one rank, which hands it out: all have
the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from usp.attention import block
from usp.attention.given import Tensors
from usp.attention.ring import Ring, calls
from usp.backends import Backend, max_bands
from usp.distributed.comm import Axis
from usp.distributed.parcel import Parcel, sent
from usp.ops.merge import merge_into
from usp.ops.pack import pack
from usp.planning.problem import state_dtype
from usp.planning.shares import pieces


@dataclass(frozen=True, eq=False)
class Replicas:
    """Who computes what with whom.

    Attributes:
        local: What this rank computes by itself.
        axes: Along which results are merged, one after the other.
    """

    local: Ring
    axes: tuple[Axis, ...]

    @property
    def backend(self) -> Backend:
        return self.local.backend


def replicas_forward(inputs: Tensors, call: Replicas) -> tuple[Tensor, Tensor]:
    """Attention of all queries over the keys of all ranks.

    Args:
        inputs: All queries and this rank's keys, without an additive bias.

    Returns:
        out: (B, Lq, H, Dv), dtype of q. lse: (B, H, Lq) in the dtype of the state.
    """
    (step,), local = call.local.plan.steps, call.local
    state = block.new_state(inputs.q, inputs.v.shape[-1])
    assert state.out is not None
    bands = max_bands(local.backend, inputs.q.device)
    own = [[load.samples.of(x) for x in inputs.travelling] for load in step.loads]
    for _, samples, piece in calls(inputs, step, own, local, bands):
        part = state._replace(out=samples.of(state.out), lse=samples.of(state.lse))
        block.attention_forward(piece, part, local.backend)
    found = [_rows(state.out), _rows(state.lse)]
    for axis in call.axes:
        dtypes = _handed_out(axis, call, inputs.q.dtype), state.lse.dtype
        found = _combined(axis, found, lambda mine, more: merge_into(*mine, *more), dtypes)
    out, lse = (_of_rows(x, inputs.q.shape[2]) for x in found)
    return out.to(inputs.q.dtype), lse


def summed(cotangents: Sequence[Tensor], call: Replicas) -> list[Tensor]:
    """What all ranks' copies of the results got, added up.

    Args:
        cotangents: (B, Lq, H, Dv) of out, and (B, H, Lq) of the LSE where it was returned.
    """
    given = [x.dtype for x in cotangents]
    found, heads = [_rows(x) for x in cotangents], cotangents[0].shape[2]
    for axis in call.axes:
        dtypes = [_handed_out(axis, call, dtype) for dtype in given]
        found = _combined(axis, found, _add, dtypes)
    return [_of_rows(x, heads).to(dtype) for x, dtype in zip(found, given, strict=True)]


def _rows(x: Tensor) -> Tensor:
    """Each head of a query as a query of its own: one query is many pieces, too.

    (B, Lq, H, D) -> (B, Lq H, 1, D), (B, H, Lq) -> (B, 1, Lq H).
    """
    return x.flatten(1, 2)[:, :, None] if x.dim() == 4 else x.transpose(1, 2).flatten(1)[:, None]


def _of_rows(x: Tensor, heads: int) -> Tensor:
    """The way back."""
    if x.dim() == 4:
        return x[:, :, 0].unflatten(1, (-1, heads))
    return x[:, 0].unflatten(1, (-1, heads)).transpose(1, 2).contiguous()


def _add(mine: Sequence[Tensor], more: Sequence[Tensor]) -> None:
    for total, x in zip(mine, more, strict=True):
        total += x


def _handed_out(axis: Axis, call: Replicas, dtype: torch.dtype) -> torch.dtype:
    """Rounded once, at the end."""
    return dtype if axis is call.axes[-1] else state_dtype(dtype)


def _combined(
    axis: Axis,
    tensors: Sequence[Tensor],
    combine: Callable[[Sequence[Tensor], Sequence[Tensor]], None],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """Everyone's tensors as one, the same on all ranks of the axis.

    Args:
        tensors: (B, Lq, H, D) or (B, H, Lq).
        combine: Takes more into what is there, in the dtype of the state.
        dtypes: Of the results.
    """
    if axis.size == 1:
        return list(tensors)
    lengths, device = pieces(tensors[0].shape[1], axis.size), tensors[0].device
    starts = list(accumulate(lengths, initial=0))
    parts = [[_queries(x, *starts[r : r + 2]) for x in tensors] for r in range(axis.size)]
    mine = parts[axis.rank]
    others = [rank for rank in range(axis.size) if rank != axis.rank]
    theirs = {rank: parts[rank] for rank in others}
    came = sent(axis, theirs, dict.fromkeys(others, Parcel.of(mine)), device)
    total = [x.to(state_dtype(x.dtype), copy=True) for x in mine]
    for rank in others:
        combine(total, came[rank])
    message = pack([x.to(dtype) for x, dtype in zip(total, dtypes, strict=True)])
    parcels = [Parcel(tuple(tuple(x.shape) for x in part), tuple(dtypes)) for part in parts]
    sizes = [parcel.nbytes for parcel in parcels]
    whole = axis.all_gather(message, message.new_empty(sum(sizes)), sizes)()
    read = [parcel.read(x) for parcel, x in zip(parcels, whole.split(sizes), strict=True)]
    return [torch.cat(found, _dim(found[0])) for found in zip(*read, strict=True)]


def _dim(x: Tensor) -> int:
    """That of the queries."""
    return 1 if x.dim() == 4 else 2


def _queries(x: Tensor, start: int, stop: int) -> Tensor:
    return x.narrow(_dim(x), start, stop - start).contiguous()
