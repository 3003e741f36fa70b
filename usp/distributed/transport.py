"""How blocks of keys travel along the ring axis, and how their gradients come home.

Transports run the same plan: ``ring`` passes one block a hop, the next in flight while this
one computes; ``allgather`` gathers every block in one collective while the own block computes
(Llama-3's way; also Long-Sequence-Segmentation). Both yield blocks in the order of the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from usp.distributed.comm import Axis, Wait
from usp.distributed.parcel import Parcel
from usp.ops.pack import pack


class Sums(Protocol):
    """Gradients of blocks on their way home."""

    def fresh(self, owner: int) -> list[Tensor]:
        """Zeros to add this rank's gradients of the owner's block to; anything if it is the only
        block, to be overwritten."""

    def pass_on(self) -> None:
        """Send on what ``fresh`` gave; returns at once."""

    def home(self) -> list[Tensor]:
        """The gradients of this rank's own block, summed over the ranks that used it."""


class Transport(Protocol):
    def blocks(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """This rank's block, then that of each earlier rank in turn, one for each step."""

    def sums(self, parcels: Sequence[Parcel], device: torch.device) -> Sums:
        """Where gradients of the blocks are summed; ``parcels`` are theirs, one an owner."""


class RingTransport:
    """One fused message a hop, into two buffers that take turns.

    Args:
        axis: The ring.
        hops: How often a block is passed on, 1 to ``axis.size - 1``.
        parcels: The block of each owner.
    """

    def __init__(self, axis: Axis, hops: int, parcels: Sequence[Parcel]):
        self._axis, self._hops, self._parcels = axis, hops, parcels

    def blocks(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        axis, held = self._axis, list(tensors)
        buffers = _buffers(2, self._parcels, tensors[0].device)
        mine = self._parcels[axis.rank]
        message = pack(held, buffers[1][: mine.nbytes])
        for hop in range(self._hops):
            parcel = self._parcels[(axis.rank - hop - 1) % axis.size]
            wait = axis.shift(message, buffers[hop % 2][: parcel.nbytes])
            yield held
            message = wait()
            held = parcel.read(message)
        yield held

    def sums(self, parcels: Sequence[Parcel], device: torch.device) -> Sums:
        return TravellingSums(self._axis, self._hops, parcels, device)


class TravellingSums:
    """Gradients travel one hop behind their block; after the last step they jump home."""

    def __init__(self, axis: Axis, hops: int, parcels: Sequence[Parcel], device: torch.device):
        self._axis, self._hops, self._parcels, self._step = axis, hops, parcels, 0
        # One is computed in, one is being sent, one arrives.
        self._buffers = _buffers(3, parcels, device)
        self._wait: Wait | None = None

    def _owned(self, buffer: int, step: int) -> Tensor:
        owner = (self._axis.rank - step) % self._axis.size
        return self._buffers[buffer][: self._parcels[owner].nbytes]

    def fresh(self, owner: int) -> list[Tensor]:
        assert owner == (self._axis.rank - self._step) % self._axis.size
        return self._parcels[owner].read(self._owned(0, self._step).zero_())

    def pass_on(self) -> None:
        step, self._step = self._step, self._step + 1
        buffers, computed = self._buffers, self._owned(0, step)
        if self._wait is None:
            # The first message is what was computed in; a spare buffer takes its place.
            message = computed
            buffers[0], buffers[1] = buffers[1], buffers[0]
        else:
            message, dtype = self._wait(), self._parcels[0].dtypes[0]
            message.view(dtype).add_(computed.view(dtype))
            buffers[1], buffers[2] = buffers[2], buffers[1]
        last = step == self._hops
        arriving = self._owned(2, 0 if last else step + 1)
        self._wait = self._axis.shift(message, arriving, by=-self._hops if last else 1)

    def home(self) -> list[Tensor]:
        assert self._wait is not None
        return self._parcels[self._axis.rank].read(self._wait())


class AllGatherTransport:
    """Every block in one fused collective, in flight while the own block computes."""

    def __init__(self, axis: Axis, hops: int, parcels: Sequence[Parcel]):
        self._axis, self._hops, self._parcels = axis, hops, parcels

    def blocks(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        axis, sizes = self._axis, [parcel.nbytes for parcel in self._parcels]
        whole = torch.empty(sum(sizes), dtype=torch.uint8, device=tensors[0].device)
        wait = axis.all_gather(pack(tensors), whole, sizes)
        yield list(tensors)
        pieces = wait().split(sizes)
        for step in range(1, self._hops + 1):
            owner = (axis.rank - step) % axis.size
            yield self._parcels[owner].read(pieces[owner])

    def sums(self, parcels: Sequence[Parcel], device: torch.device) -> Sums:
        return GatheredSums(self._axis, parcels, device)


class GatheredSums:
    """Gradients of every block are kept here and reduce-scattered in one exchange at the end."""

    def __init__(self, axis: Axis, parcels: Sequence[Parcel], device: torch.device):
        self._axis, self._parcels = axis, parcels
        self._sizes = [parcel.nbytes for parcel in parcels]
        self._whole = torch.zeros(sum(self._sizes), dtype=torch.uint8, device=device)

    def fresh(self, owner: int) -> list[Tensor]:
        return self._parcels[owner].read(self._whole.split(self._sizes)[owner])

    def pass_on(self) -> None:
        pass

    def home(self) -> list[Tensor]:
        axis, mine = self._axis, self._parcels[self._axis.rank]
        parts = axis.all_to_all(self._whole, self._sizes, [mine.nbytes] * axis.size)
        # Summed in rank order: the same bits whatever the collective's algorithm is.
        total = parts.view(mine.dtypes[0]).view(axis.size, -1).sum(0)
        return mine.read(total.view(torch.uint8))


class NoTransport:
    """Every rank needs its own block alone: one device, no ring, or documents that fit a rank."""

    def __init__(self, axis: Axis):
        self._rank = axis.rank

    def blocks(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        yield list(tensors)

    def sums(self, parcels: Sequence[Parcel], device: torch.device) -> Sums:
        return OwnSums(parcels[self._rank], device)


class OwnSums:
    """Gradients that are at home already."""

    def __init__(self, parcel: Parcel, device: torch.device):
        items = zip(parcel.shapes, parcel.dtypes, strict=True)
        self._sums = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in items]

    def fresh(self, owner: int) -> list[Tensor]:
        return self._sums

    def pass_on(self) -> None:
        pass

    def home(self) -> list[Tensor]:
        return self._sums


TRANSPORTS: dict[str, type[RingTransport] | type[AllGatherTransport]] = {
    "ring": RingTransport,
    "allgather": AllGatherTransport,
}


def check_transport(name: str) -> None:
    """Refuse an unknown transport.

    Raises:
        ValueError: names it and those there are.
    """
    if not isinstance(name, str) or name not in TRANSPORTS:
        raise ValueError(f"unknown transport {name!r}: use one of {', '.join(TRANSPORTS)}")


def make_transport(name: str, axis: Axis, hops: int, parcels: Sequence[Parcel]) -> Transport:
    """How blocks travel.

    Args:
        name: Of TRANSPORTS.
        axis: The ring.
        hops: How often a block is passed on, at most ``axis.size - 1``.
        parcels: The block of each owner; not needed without hops.
    """
    return TRANSPORTS[name](axis, hops, parcels) if hops else NoTransport(axis)


def _buffers(count: int, parcels: Sequence[Parcel], device: torch.device) -> list[Tensor]:
    size = max(parcel.nbytes for parcel in parcels)
    return [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
