"""How blocks of keys travel along the ring axis, and how their gradients come home.

A route (``planning/route.py``) says which rows come when. Blocks passed on from rank to rank are in
flight while the ones before them compute; rows that are exchanged directly, or gathered (Llama-3's
way; also Long-Sequence-Segmentation), while the own block does. Both yield blocks in the order of
the plan, and add the gradients of what they brought to those of its owner.

Cargo is one list of tensors for each part of the batch: the keys of a step, their values, ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor

from usp.distributed.comm import Axis
from usp.distributed.parcel import Parcel
from usp.ops.pack import pack
from usp.planning.route import TRANSPORTS, Cargo, Direction, Exchange, Ring, Route

Parts = list[list[Tensor]]
Wait = Callable[[], object]


class Sums(Protocol):
    """Gradients of blocks that came, on their way home."""

    def fresh(self) -> Parts:
        """Zeros to add this rank's gradients of the next block that came to."""

    def pass_on(self) -> None:
        """Send on what ``fresh`` gave; returns at once."""

    def home(self, own: Parts) -> None:
        """Add the gradients of this rank's own rows that other ranks found."""


class Transport(Protocol):
    def blocks(self, own: Parts) -> Iterator[Parts]:
        """This rank's block, then those that come, one for each step of the plan."""

    def sums(self, own: Parts) -> Sums:
        """Where gradients are summed, of the shapes and dtypes of ``own``."""


class RingTransport:
    """One fused message a hop and direction, into two buffers that take turns."""

    def __init__(self, axis: Axis, route: Ring):
        self._axis, self._route = axis, route

    def blocks(self, own: Parts) -> Iterator[Parts]:
        streams = [self._stream(direction, own) for direction in self._route.directions]
        firsts = [next(stream) for stream in streams]  # posts the first hops
        yield firsts[0]
        for turn in range(max(len(direction.hops) for direction in self._route.directions)):
            for direction, stream in zip(self._route.directions, streams, strict=True):
                if turn < len(direction.hops):
                    yield next(stream)

    def _stream(self, direction: Direction, own: Parts) -> Iterator[Parts]:
        axis, held, message = self._axis, own, None
        arriving = [_parcel(own, hop.arrival.cargo) for hop in direction.hops]
        buffers = _buffers(2, arriving, own)
        for i, (hop, parcel) in enumerate(zip(direction.hops, arriving, strict=True)):
            if message is None or not all(rows.are_all for rows in hop.passed):
                message = _packed(held, hop.passed)
            wait = axis.shift(message, buffers[i % 2][: parcel.nbytes], direction.by)
            yield held
            message = wait()
            held = _split(parcel.read(message), own)
        yield held

    def sums(self, own: Parts) -> Sums:
        return TravellingSums(self._axis, self._route, own)


class TravellingSums:
    """Gradients travel behind their block, and from the last rank that needs it they jump home."""

    def __init__(self, axis: Axis, route: Ring, own: Parts):
        chains = [_Chain(axis, direction, own) for direction in route.directions]
        hops = ([(chain, hop) for hop in range(len(chain))] for chain in chains)
        # in the order of the arrivals: from both sides in turn
        self._order = [each for pair in zip_longest(*hops) for each in pair if each is not None]
        self._chains = chains
        self._coming, self._going = iter(self._order), iter(self._order)

    def fresh(self) -> Parts:
        chain, hop = next(self._coming)
        return chain.fresh(hop)

    def pass_on(self) -> None:
        chain, hop = next(self._going)
        chain.pass_on(hop)

    def home(self, own: Parts) -> None:
        for chain in self._chains:
            chain.home(own)


class _Chain:
    """The gradients that move in one direction."""

    def __init__(self, axis: Axis, direction: Direction, own: Parts):
        self._axis, self._direction, self._own = axis, direction, own
        self._parcels = [_parcel(own, cargo) for cargo in direction.first]
        # what was computed at a hop, sums of the owner whose block is next, those of the own block
        self._computed: dict[int, tuple[Tensor, Parts]] = {}
        self._coming: Tensor | None = None
        self._home: Tensor | None = None
        self._posted: Wait = _nothing  # what nobody waits for is never sent

    def __len__(self) -> int:
        return len(self._direction.hops)

    def fresh(self, hop: int) -> Parts:
        self._computed[hop] = _zeros(self._own, self._direction.hops[hop].arrival.cargo)
        return self._computed[hop][1]

    def pass_on(self, hop: int) -> None:
        """Rank r, at hop h counted from 1, has just computed with the block of owner r - h."""
        axis, direction = self._axis, self._direction
        distance, by, reach = hop + 1, direction.by, direction.reach
        owner = direction.hops[hop].arrival.owner
        behind = (axis.rank - by * (distance + 1)) % axis.size
        send: list[tuple[int, Tensor]] = []
        receive: list[tuple[int, Tensor]] = []
        if distance <= reach[owner]:
            message = self._merged(hop, owner)
            # the last rank that needs a block sends its gradients home
            step = -by * distance if distance == reach[owner] else by
            send.append((step, message))
        if distance < reach[behind]:
            receive.append((-by, self._buffer(behind)))
        if distance == reach[axis.rank]:
            receive.append((by * distance, self._buffer(axis.rank)))
        self._wait()
        self._posted = axis.exchange(send, receive)
        self._coming = receive[0][1] if distance < reach[behind] else None
        if distance == reach[axis.rank]:
            self._home = receive[-1][1]

    def _merged(self, hop: int, owner: int) -> Tensor:
        """What was computed here, and what came with the block."""
        message, computed = self._computed.pop(hop)
        if hop == 0:
            return message
        assert self._coming is not None
        self._wait()
        message = self._coming
        cargo, whose = self._direction.hops[hop].arrival.cargo, self._direction.first[owner]
        inside = tuple(rows.within(those) for rows, those in zip(cargo, whose, strict=True))
        _add(_split(self._parcels[owner].read(message), self._own), computed, inside)
        return message

    def _wait(self) -> None:
        """Once for each exchange: what came may be added to from then on."""
        self._posted()
        self._posted = _nothing

    def _buffer(self, owner: int) -> Tensor:
        return _empty(self._parcels[owner].nbytes, self._own)

    def home(self, own: Parts) -> None:
        self._wait()
        if self._home is not None:
            rank = self._axis.rank
            came = _split(self._parcels[rank].read(self._home), own)
            _add(own, came, self._direction.own)


class ExchangeTransport:
    """Rows from their owners straight to those who need them, in one exchange."""

    def __init__(self, axis: Axis, route: Exchange):
        self._axis, self._route = axis, route

    def blocks(self, own: Parts) -> Iterator[Parts]:
        axis, route = self._axis, self._route
        parcels = {arrival.owner: _parcel(own, arrival.cargo) for arrival in route.arrivals}
        if route.gathers:
            parcels[axis.rank] = Parcel.of(_flat(own))
        sizes = [parcels[r].nbytes if r in parcels else 0 for r in range(axis.size)]
        whole = _empty(sum(sizes), own)
        pieces = whole.split(sizes)
        if route.gathers:
            wait: Wait = axis.all_gather(pack(_flat(own)), whole, sizes)
        else:
            send = [(r - axis.rank, _packed(own, route.sent_to[r])) for r in _others(axis)]
            wait = axis.exchange(send, [(r - axis.rank, pieces[r]) for r in _others(axis)])
        yield own
        wait()
        for arrival in route.arrivals:
            yield _split(parcels[arrival.owner].read(pieces[arrival.owner]), own)

    def sums(self, own: Parts) -> Sums:
        return ExchangedSums(self._axis, self._route, own)


class ExchangedSums:
    """Gradients of all that came are kept, and go straight home in one exchange at the end."""

    def __init__(self, axis: Axis, route: Exchange, own: Parts):
        self._axis, self._route = axis, route
        made = [_zeros(own, arrival.cargo) for arrival in route.arrivals]
        self._messages = [message for message, _ in made]
        self._parts = iter([parts for _, parts in made])

    def fresh(self) -> Parts:
        return next(self._parts)

    def pass_on(self) -> None:
        pass

    def home(self, own: Parts) -> None:
        axis, route = self._axis, self._route
        owners = [arrival.owner for arrival in route.arrivals]
        send = [(o - axis.rank, m) for o, m in zip(owners, self._messages, strict=True)]
        parcels = {r: _parcel(own, route.sent_to[r]) for r in _others(axis)}
        came = {r: _empty(parcel.nbytes, own) for r, parcel in parcels.items()}
        axis.exchange(send, [(r - axis.rank, message) for r, message in came.items()])()
        for r in sorted(came):  # in rank order: the same bits every time
            _add(own, _split(parcels[r].read(came[r]), own), route.sent_to[r])


class NoTransport:
    """Every rank needs its own block alone: one device, no ring, or documents that fit a rank."""

    def blocks(self, own: Parts) -> Iterator[Parts]:
        yield own

    def sums(self, own: Parts) -> Sums:
        return OwnSums()


class OwnSums:
    """Gradients that are at home already."""

    def fresh(self) -> Parts:
        raise AssertionError("no block comes")

    def pass_on(self) -> None:
        pass

    def home(self, own: Parts) -> None:
        pass


def check_transport(name: str) -> None:
    """Refuse an unknown transport.

    Raises:
        ValueError: names it and those there are.
    """
    if not isinstance(name, str) or name not in TRANSPORTS:
        raise ValueError(f"unknown transport {name!r}: use one of {', '.join(TRANSPORTS)}")


def make_transport(axis: Axis, route: Route | None) -> Transport:
    """How blocks travel.

    Args:
        axis: The ring.
        route: This rank's; None where nothing travels.
    """
    if route is None:
        return NoTransport()
    return RingTransport(axis, route) if isinstance(route, Ring) else ExchangeTransport(axis, route)


def _nothing() -> None:
    """Waits for nothing."""


def _others(axis: Axis) -> list[int]:
    """The other ranks, from the next one on: no two ranks begin with the same."""
    return [(axis.rank + step) % axis.size for step in range(1, axis.size)]


def _flat(parts: Parts) -> list[Tensor]:
    return [tensor for part in parts for tensor in part]


def _split(tensors: Sequence[Tensor], like: Parts) -> Parts:
    """What lies one behind the other by parts again."""
    each = iter(tensors)
    return [[next(each) for _ in part] for part in like]


def _parcel(own: Parts, cargo: Cargo) -> Parcel:
    """So many rows of each part."""
    shapes = [
        (x.shape[0], len(rows), *x.shape[2:])
        for part, rows in zip(own, cargo, strict=True)
        for x in part
    ]
    return Parcel(tuple(shapes), tuple(x.dtype for x in _flat(own)))


def _packed(held: Parts, cargo: Cargo) -> Tensor:
    """Some rows of what is held as one message."""
    return pack([rows.of(x) for part, rows in zip(held, cargo, strict=True) for x in part])


def _add(sums: Parts, parts: Parts, cargo: Cargo) -> None:
    """Add rows to what holds them all."""
    for totals, found, rows in zip(sums, parts, cargo, strict=True):
        for total, part in zip(totals, found, strict=True):
            rows.add_to(total, part)


def _zeros(own: Parts, cargo: Cargo) -> tuple[Tensor, Parts]:
    """A message of zeros and the parts in it."""
    parcel = _parcel(own, cargo)
    message = _empty(parcel.nbytes, own).zero_()
    return message, _split(parcel.read(message), own)


def _empty(size: int, own: Parts) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=own[0][0].device)


def _buffers(count: int, parcels: Sequence[Parcel], own: Parts) -> list[Tensor]:
    size = max(parcel.nbytes for parcel in parcels)
    return [_empty(size, own) for _ in range(count)]
