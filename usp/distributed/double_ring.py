"""How blocks travel along a ring of two levels: an ordinary transport along each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from usp.distributed.comm import Axis
from usp.distributed.transport import Parts, Sums, Transport, make_transport
from usp.planning.double_ring import DoubleRing
from usp.planning.route import Route

Verb = Callable[[], object]


class DoubleRingTransport:
    """Blocks come along the outer axis; each goes round the inner one while the next is coming."""

    def __init__(self, outer: Axis, inner: Axis, route: DoubleRing):
        self.outer = make_transport(outer, route.outer)
        self.inner = [make_transport(inner, each) for each in route.inner]
        self.route = route

    def blocks(self, own: Parts) -> Iterator[Parts]:
        for held, inner in zip(self.outer.blocks(own), self.inner, strict=True):
            yield from inner.blocks(held)

    def sums(self, own: Parts) -> Sums:
        return DoubleRingSums(self, own)


class DoubleRingSums:
    """Gradients of a block come together in the node where it is, and go on from there.

    They do so once the next block has been computed with: they arrive meanwhile.
    """

    def __init__(self, transport: DoubleRingTransport, own: Parts):
        self._transport, self._own = transport, own
        self._outer = transport.outer.sums(own)
        self._steps = self._each_step()
        self._pass_on: Verb = _nothing
        self._settle: Verb = _nothing  # what is left of the last block

    def _each_step(self) -> Iterator[tuple[Parts, Verb]]:
        """Zeros to add to, and what to do when that is done."""
        routes = self._transport.route.inner
        for index, (transport, route) in enumerate(zip(self._transport.inner, routes, strict=True)):
            held = self._outer.fresh() if index else self._own
            inner, before = transport.sums(held), self._settle
            self._settle = partial(self._together, inner, held, index > 0)
            if index:
                yield held, before
            for _ in () if route is None else route.arrivals:
                yield inner.fresh(), inner.pass_on

    def _together(self, inner: Sums, held: Parts, goes_on: bool) -> None:
        inner.home(held)
        if goes_on:
            self._outer.pass_on()

    def fresh(self) -> Parts:
        zeros, self._pass_on = next(self._steps)
        return zeros

    def pass_on(self) -> None:
        self._pass_on()

    def home(self, own: Parts) -> None:
        self._settle()
        self._outer.home(own)


def transport_along(
    axis: Axis, route: Route | DoubleRing | None, levels: tuple[Axis, Axis] | None = None
) -> Transport:
    """How blocks travel along a ring of one level, or of two."""
    if isinstance(route, DoubleRing):
        assert levels is not None
        return DoubleRingTransport(*levels, route)
    return make_transport(axis, route)


def _nothing() -> None:
    """Before the first block there is nothing to do."""
