"""Whole rings whose ranks take turns on one device.

usp runs its own executor; only the messages are not sent: each lies where the next rank finds it.
The rival is the ring as ring-flash-attention runs it: a library's partial results in the inputs'
dtype, merged in fp32 by PyTorch, zigzag cut into whole halves of queries or keys, gradients of a
block added to fp32 sums that travel with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from usp import long_context_attention
from usp.attention import block
from usp.attention.given import Tensors
from usp.attention.ring import Ring, ring_backward, ring_forward
from usp.bench.attention import Own
from usp.bench.exact import NAMES, exact_heads, relative_error
from usp.bench.libraries import Library, Merge
from usp.distributed.comm import Axis, Wait
from usp.distributed.parcel import Parcel
from usp.ops.pack import pack
from usp.planning.heads import Heads
from usp.planning.masks.terms import causal
from usp.planning.plan import make_plan
from usp.planning.problem import Scoring, State
from usp.planning.route import Arrival, Direction
from usp.planning.route import Ring as Route
from usp.planning.rows import Rows
from usp.planning.samples import masks_of


@dataclass(frozen=True)
class VirtualAxis(Axis):
    """A ring seen from one rank whose neighbours' messages are all there already.

    Attributes:
        arriving: Of each direction, packed keys and values of each hop.
        chains: In the order of the steps, whose gradients are sent on, and of which rows.
        sums: Every owner's gradients so far, fp32; what a rank sends on is added there.
    """

    arriving: Mapping[int, Iterator[Tensor]] = field(default_factory=dict)
    chains: Iterator[tuple[int, Rows]] = field(default_factory=lambda: iter(()))
    sums: Sequence[Sequence[Tensor]] = ()

    def shift(self, message: Tensor, out: Tensor, by: int = 1) -> Wait:
        arrived = next(self.arriving[by])
        return lambda: arrived

    def exchange(
        self, send: Sequence[tuple[int, Tensor]], receive: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        owner, rows = next(self.chains)
        for _, message in send:
            totals = self.sums[owner]
            shapes = tuple((x.shape[0], len(rows), *x.shape[2:]) for x in totals)
            parcel = Parcel(shapes, tuple(x.dtype for x in totals))
            for total, part in zip(totals, parcel.read(message), strict=True):
                rows.add_to(total, part)
        for _, buffer in receive:  # the others have added their part to the sums
            buffer.zero_()
        return lambda: None


class VirtualRing:
    """A causal zigzag ring whose ranks take turns.

    Args:
        ranks: Size of the ring.
        tensors: q, k, v, dout (1, all tokens, H, D) in 16 bits.
    """

    def __init__(self, ranks: int, tensors: Sequence[Tensor]) -> None:
        self.ranks, self.tensors = ranks, tensors
        lengths, masks = (tensors[0].shape[1],) * 2, masks_of(causal())
        self.plans = [make_plan(masks, "zigzag", lengths, ranks, r, "ring") for r in range(ranks)]
        self.rows = [plan.queries.on(tensors[0].device) for plan in self.plans]
        self.shards = [[x.index_select(1, row) for x in tensors] for row in self.rows]

    def usp(self, own: Own, which: str, ranks: Sequence[int]) -> Callable[[], Parts]:
        """A call of usp's executor for some ranks in turn; dk and dv are right if it is all."""
        messages = {rank: self._messages(rank) for rank in ranks}
        sums = [[torch.zeros_like(x, dtype=torch.float32) for x in s[1:3]] for s in self.shards]

        def run() -> Parts:
            for total in chain(*sums):
                total.zero_()
            each = (self._rank(r, own.backend, which, messages[r], sums) for r in ranks)
            return own(joined, each)

        return run

    def _rank(
        self,
        rank: int,
        backend: Any,
        which: str,
        messages: Mapping[int, list[Tensor]],
        sums: Sequence[Sequence[Tensor]],
    ) -> Sequence[Tensor]:
        q, k, v, dout = self.shards[rank]
        inputs, heads = Tensors(q, k, v), Heads(0, q.shape[2], q.shape[2], 1)
        scoring = Scoring(q.shape[-1] ** -0.5)

        def ring() -> Ring:
            arriving = {by: iter(each) for by, each in messages.items()}
            axis = VirtualAxis(self.ranks, rank, None, arriving, iter(self._chains(rank)), sums)
            return Ring(axis, self.plans[rank], heads, scoring, backend)

        out, lse, _ = ring_forward(inputs, ring())
        if which == "forward":
            return (out,)
        saved = block.saved_for_backward(dout, None, out, lse, backend)
        grads = ring_backward(inputs, saved, ring(), False, kv_dtype=lse.dtype)
        # dk and dv change until every rank has added to them
        for total, grad in zip(sums[rank], (grads.dk, grads.dv), strict=True):
            total += grad
        return out, grads.dq, *sums[rank]

    def _directions(self, rank: int) -> tuple[Direction, ...]:
        route = self.plans[rank].route
        return route.directions if isinstance(route, Route) else ()

    def _messages(self, rank: int) -> dict[int, list[Tensor]]:
        """What comes to a rank from each side, hop by hop."""

        def message(arrival: Arrival) -> Tensor:
            (rows,) = arrival.cargo
            return pack([rows.of(x) for x in self.shards[arrival.owner][1:3]])

        return {
            direction.by: [message(hop.arrival) for hop in direction.hops]
            for direction in self._directions(rank)
        }

    def _chains(self, rank: int) -> list[tuple[int, Rows]]:
        each = (
            [(hop.arrival.owner, direction.first[hop.arrival.owner][0]) for hop in direction.hops]
            for direction in self._directions(rank)
        )
        return [found for turn in zip_longest(*each) for found in turn if found is not None]

    def library(
        self, library: Library, merge: Merge, which: str, ranks: Sequence[int]
    ) -> Callable[[], Parts]:
        """The same by a library and a merge."""

        home = [[torch.zeros_like(x, dtype=torch.float32) for x in s[1:3]] for s in self.shards]

        def run() -> Parts:
            for total in chain(*home):
                total.zero_()
            return joined(
                LibraryRank(self, rank, library, merge, home).run(which) for rank in ranks
            )

        return run

    def one_call(self, own: Own, which: str) -> Callable[[], object]:
        """The whole sequence at once, which a ring can at best be as fast as."""
        q, k, v = (x.detach().requires_grad_(which == "both") for x in self.tensors[:3])

        def run() -> object:
            out = long_context_attention(q, k, v, causal=True, backend=own.backend.NAME)
            assert isinstance(out, Tensor)
            if which == "both":
                return torch.autograd.grad(out, (q, k, v), self.tensors[3])
            return out

        return partial(own, run)

    def errors(self, parts: Parts, exact: dict[str, Tensor]) -> dict[str, float]:
        """Relative rms error of the last head."""
        order = torch.cat(self.rows).argsort()
        return {
            name: relative_error(torch.cat(found, 1)[0, order, -1], exact[name].flatten(1))
            for name, found in parts.items()
        }

    def exact(self) -> dict[str, Tensor]:
        """out, dq, dk, dv of the last head in fp64."""
        q, k, v, dout = (x[0, :, -1] for x in self.tensors)
        stop = torch.arange(1, len(q) + 1, device=q.device)
        interval = torch.zeros_like(stop), stop
        return exact_heads((q[:, None], k, v, dout[:, None]), interval, q.shape[1] ** -0.5)


Parts = dict[str, list[Tensor]]


def joined(ranks: Iterator[Sequence[Tensor]]) -> Parts:
    """out and, with a backward, dq, dk, dv of all ranks, in the dtype of the first."""
    columns = zip(*list(ranks), strict=True)
    parts = dict(zip(NAMES, map(list, columns), strict=False))
    dtype = parts["out"][0].dtype
    return {name: [x.to(dtype) for x in found] for name, found in parts.items()}


@dataclass(frozen=True, eq=False)
class LibraryRank:
    """One rank of a zigzag ring by library calls.

    What it reads and adds to lies where it is, in the shards and in ``home``, every owner's fp32
    dk and dv. What a rank would have received them in is made, and not used: it takes memory.
    """

    ring: VirtualRing
    rank: int
    library: Library
    merge: Merge
    home: list[list[Tensor]]

    def run(self, which: str) -> Sequence[Tensor]:
        q, k, v, _ = self.ring.shards[self.rank]
        out, lse, kept = self.library.forward(q, k, v, True)
        whole, sums, kept_of = out.float(), lse.float().clone(), [kept]
        for _, rows, keys, (k, v) in self.hops():
            out, lse, kept = self.library.forward(q[:, rows], k[:, keys], v[:, keys], False)
            self.merge(State(whole[:, rows], sums[:, :, rows]), out, lse)
            kept_of.append(kept)
        out = whole.to(q.dtype)
        if which == "forward":
            return (out,)
        del whole
        return out, *self.backward(out, sums, kept_of)

    def hops(self) -> Iterator[tuple[int, slice, slice, list[Tensor]]]:
        """Step, rows of queries and of keys, and the keys and values that arrived for it."""
        half = self.ring.shards[self.rank][0].shape[1] // 2
        for step in range(1, self.ring.ranks):
            arrived = self.ring.shards[(self.rank - step) % self.ring.ranks][1:3]
            # where they would have been received, and those of the next step
            sets = 1 + (step + 1 < self.ring.ranks)
            room = [torch.empty_like(x) for x in sets * arrived]
            earlier = step <= self.rank
            rows, keys = slice(0 if earlier else half, None), slice(half if earlier else None)
            yield step, rows, keys, arrived
            del room

    def backward(self, out: Tensor, lse: Tensor, kept_of: list[object]) -> list[Tensor]:
        q, k, v, dout = self.ring.shards[self.rank]
        grads = self.library.backward(dout, q, k, v, out, lse, True, kept_of[0])
        dq = grads[0].float()
        self.add(self.rank, slice(None), grads[1:])
        for step, rows, keys, (k, v) in self.hops():
            room = [torch.empty_like(x) for x in 2 * self.home[0]]  # sums here and arriving
            grads = self.library.backward(
                dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows],
                lse[:, :, rows].contiguous(), False, kept_of[step],
            )  # fmt: skip
            dq[:, rows] += grads[0]
            self.add((self.rank - step) % self.ring.ranks, keys, grads[1:])
            del room
        return [dq.to(q.dtype), *self.home[self.rank]]

    def add(self, owner: int, keys: slice, grads: Sequence[Tensor]) -> None:
        for total, grad in zip(self.home[owner], grads, strict=True):
            total[:, keys] += grad
