"""Keys and values that wait for chunks of queries: a transport, as other ranks are one.

The first chunk of queries meets pages as they come, from the head exchange and along the ring.
Those that a later chunk sees wait, and come again from where they do, the next one on its way while
the one before it is computed with. In a backward sums of gradients wait beside them, and go home
when all chunks of queries are done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from usp.attention.ring import Ring
from usp.distributed.double_ring import transport_along
from usp.distributed.transport import Parts, Transport
from usp.ops.waiting import Fetched, Reader, Store
from usp.planning.chunks import AnyRoute, Chunks

# Keys and values of a chunk, and by what they are fetched again.
Own = tuple[list[Tensor], list[Tensor]]


class Pages:
    """The keys of some heads.

    Args:
        ring: Who computes what with whom.
        chunks: Its plan in chunks.
        store, reader: Where they wait, and how they come back.
        masks: Of each page and part of the batch the padding mask in a list; empty without one.
        own: Of each chunk this rank's keys and values, (B, Lk, G, D) and (B, Lk, G, Dv).
        dtype: Of sums of gradients.
    """

    def __init__(
        self,
        ring: Ring,
        chunks: Chunks,
        store: Store,
        reader: Reader,
        masks: Sequence[Parts],
        own: Iterable[Own],
        dtype: torch.dtype,
    ):
        self.ring, self.chunks = ring, chunks
        self._store, self._masks, self._own, self._dtype = store, masks, own, dtype
        self._reader = reader
        self._waiting: dict[int, list[Tensor]] = {}
        self._sums: dict[int, list[Tensor]] = {}
        self._shapes: list[list[torch.Size]] = []

    def coming(self) -> Iterator[tuple[int, Parts, list[Tensor]]]:
        """Every page, as it comes: its number, what it holds, and no sums yet."""
        number = 0
        for route, (own, kept) in zip(self.chunks.routes, self._own, strict=True):
            self._shapes.append([x.shape for x in own])
            self._like = own[0].new_empty(0)
            for held in self._transport(route).blocks(self._by_part(own)):
                page = self.chunks.pages[number]
                if page.last > 0:
                    flat = [x for part in held for x in part]
                    # what comes lies in a buffer that is used for the next
                    came = kept if page.is_own else self._store.put(flat, lent=True)
                    self._waiting[number] = came
                yield number, held, []
                self._store.settle()
                number += 1

    def again(self, turn: int) -> Iterator[tuple[int, Parts, list[Tensor]]]:
        """The pages of which a later chunk of queries sees something, with sums so far."""
        numbers = [step.owner for step in self.chunks.plans[turn].steps[1:]]
        ahead = self._asked(numbers[0]) if numbers else None
        for number, following in zip(numbers, [*numbers[1:], None], strict=False):
            assert ahead is not None
            found, count = ahead(), len(self._waiting[number])
            if self.chunks.pages[number].last == turn:
                del self._waiting[number]
            ahead = None if following is None else self._asked(following)
            yield number, self.parts(number, found[:count]), found[count:]

    def _transport(self, route: AnyRoute | None) -> Transport:
        return transport_along(self.ring.axis, route, self.ring.levels)

    def _asked(self, number: int) -> Fetched:
        return self._reader.fetch([*self._waiting[number], *self._sums.get(number, ())])

    def parts(self, number: int, tensors: Sequence[Tensor]) -> Parts:
        """Tensors of a page by parts of the batch."""
        if self.chunks.pages[number].is_own:
            return self._by_part(tensors)
        return [list(tensors[i : i + 2]) for i in range(0, len(tensors), 2)]

    def _by_part(self, tensors: Sequence[Tensor]) -> Parts:
        loads = self.chunks.plans[0].steps[0].loads
        return [[load.samples.of(x) for x in tensors] for load in loads]

    def masked(self, number: int, held: Parts) -> Parts:
        """With the padding masks."""
        if not self._masks:
            return held
        return [part + mask for part, mask in zip(held, self._masks[number], strict=True)]

    def zeros(self, number: int, held: Parts) -> list[Tensor]:
        """Sums of gradients of a page."""
        page = self.chunks.pages[number]
        if page.is_own:
            shapes = self._shapes[page.chunk]
        else:
            shapes = [x.shape for part in held for x in part]
        return [self._like.new_zeros(shape, dtype=self._dtype) for shape in shapes]

    def wait_with(self, number: int, sums: list[Tensor]) -> None:
        """Let the sums of a page wait."""
        self._sums[number] = self._store.put(sums, self._sums.get(number))

    def home(self) -> Iterator[list[Tensor]]:
        """Of each chunk the gradients of this rank's keys and values, with what others found."""
        number, others = 0, self._store.reader()  # beside the own sums, which stay meanwhile
        for route in self.chunks.routes:
            own = self._summed(number, self._reader) or self.zeros(number, [])
            parts, arrivals = self._by_part(own), () if route is None else route.arrivals
            sums = self._transport(route).sums(parts)
            for _ in arrivals:
                number += 1
                places = [x for part in sums.fresh() for x in part]
                for place, x in zip(
                    places, self._summed(number, others), strict=False
                ):  # none if unseen
                    place.add_(x)
                sums.pass_on()
            sums.home(parts)
            yield own
            number += 1

    def _summed(self, number: int, reader: Reader) -> list[Tensor]:
        found = self._sums.pop(number, None)
        return [] if found is None else reader.fetch(found)()


@dataclass(frozen=True, eq=False)
class Turn(Ring):
    """A chunk of queries: its plan, and the pages that it meets."""

    pages: Pages = field(kw_only=True)
    number: int = field(kw_only=True)

    @property
    def transport(self) -> _Met:
        return _Met(self.pages, self.number)


def turns(pages: Pages) -> Iterator[Turn]:
    """Each chunk of queries against its pages."""
    ring = pages.ring
    for number, plan in enumerate(pages.chunks.plans):
        yield Turn(
            ring.axis, plan, ring.heads, ring.scoring, ring.backend, pages=pages, number=number
        )


class _Met:
    """The pages of a turn as blocks that come, and sums of their gradients."""

    def __init__(self, pages: Pages, turn: int):
        self._pages, self._turn = pages, turn
        self._seen = [
            any(load.seen is not None for load in step.loads)
            for step in pages.chunks.plans[turn].steps
        ]
        self._here: tuple[int, Parts, list[Tensor]] | None = None

    def blocks(self, own: Parts) -> Iterator[Parts]:
        yield own
        pages = self._pages
        steps = iter(pages.chunks.plans[self._turn].steps[1:])
        for number, held, sums in pages.again(self._turn) if self._turn else pages.coming():
            self._here = number, held, sums
            yield pages.masked(number, held)
            for load in next(steps).loads:  # their pairs are many, and each is met once a pass
                load.forget()

    def sums(self, own: Parts) -> _Met:
        self._left = iter(self._seen[1:])
        return self

    def fresh(self) -> Parts:
        assert self._here is not None
        number, held, sums = self._here
        self._is_seen = next(self._left)
        if not self._is_seen:
            return []
        self._here = number, held, sums or self._pages.zeros(number, held)
        return self._pages.parts(number, self._here[2])

    def pass_on(self) -> None:
        assert self._here is not None
        if self._is_seen:
            number, _, sums = self._here
            self._pages.wait_with(number, sums)

    def home(self, own: Parts) -> None:
        """That is done when all turns are."""
