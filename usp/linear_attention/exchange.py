"""States over ranks: what stood before this rank's tokens, and backward what came of those behind.

Rank r makes ``T_r S + update_r`` of the state S before its tokens. ``gather`` tells everyone these
two, in one collective, and every rank joins those before its own; ``ring`` passes the state
itself from rank to rank. Both join in the same order, to the same bits. Backward the gradient of a
state comes the other way, joined by the same transitions T.

Source: LASP arXiv:2404.02882 (ring), LASP-2 arXiv:2502.07563 (gather).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from usp.distributed.comm import Axis
from usp.distributed.mesh import SequenceMesh
from usp.linear_attention.transitions import moved, moved_back

METHODS = ("gather", "ring")
_ALONE = Axis(1, 0, None)


class Arrived(NamedTuple):
    """What a forward learns.

    Attributes:
        before: (B, H, D, Dv), the state before this rank's tokens.
        final: That behind the whole sequence, the same on every rank; None where nobody asked.
        transitions: Of all ranks; with the ring, of this one.
    """

    before: Tensor
    final: Tensor | None
    transitions: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Chain:
    """The ranks in the order of the sequence.

    Attributes:
        axis: All of them.
        places: The place on the axis of each.
        rank: This one's, in the order of the sequence.
        method: Of METHODS.
        returns: Whether everyone is told the final state.
    """

    axis: Axis
    places: tuple[int, ...]
    rank: int
    method: str
    returns: bool

    @classmethod
    def of(cls, mesh: SequenceMesh | None, method: str, returns: bool) -> Chain:
        if mesh is None or mesh.size == 1:
            return cls(_ALONE, (0,), 0, method, returns)
        axis, ranks = mesh.whole()
        places = tuple(ranks.index(rank) for rank in range(mesh.size))
        return cls(axis, places, mesh.rank, method, returns)

    @property
    def last(self) -> int:
        return self.axis.size - 1

    def forward(self, transition: Tensor, update: Tensor, initial: Tensor) -> Callable[[], Arrived]:
        """Begin to find out; nothing of it may change until it is asked what ``Arrived``.

        Args:
            transition: Of this rank's tokens; see ``transitions``. update: (B, H, D, Dv).
            initial: (B, H, D, Dv) before the whole sequence.
        """
        if self.method == "ring":
            return lambda: self._ring_forward(transition, update, initial)
        wait = self._gather(torch.cat((update.flatten(), transition.flatten())))

        def arrived() -> Arrived:
            told = wait()
            updates = told[:, : update.numel()].unflatten(1, update.shape)
            # each lies as on the rank that made it, so that products have the same bits
            parts = [part.clone().view(transition.shape) for part in told[:, update.numel() :]]
            state = before = initial
            for rank in range(self.axis.size if self.returns else self.rank):
                state = moved(parts[rank], state, updates[rank])
                before = state if rank + 1 == self.rank else before
            return Arrived(before, state if self.returns else None, tuple(parts))

        return arrived

    def backward(
        self, gradient: Tensor, final: Tensor | None, transitions: tuple[Tensor, ...]
    ) -> Tensor:
        """The gradient of the state behind this rank's tokens.

        Args:
            gradient: (B, H, D, Dv) of the state before them, by this rank's results.
            final: Of the final state, by what this rank made of it; None where it was not told.
            transitions: As in ``Arrived``.
        """
        if self.method == "ring":
            return self._ring_backward(gradient, final, transitions)
        parts = [gradient] if final is None else [gradient, final]
        told = self._gather(torch.cat([part.flatten() for part in parts]))()
        told = told.unflatten(1, (len(parts), *gradient.shape))
        behind = torch.zeros_like(gradient) if final is None else _in_order(told[:, 1])
        for rank in range(self.last, self.rank, -1):
            behind = moved_back(transitions[rank], behind, told[rank, 0])
        return behind

    def _gather(self, message: Tensor) -> Callable[[], Tensor]:
        """Everyone's message, (ranks, its size) in the order of the sequence."""
        size = self.axis.size
        if size == 1:
            return lambda: message[None]
        whole = message.new_empty(size * message.numel())
        wait = self.axis.all_gather(message, whole, [message.numel()] * size)
        if self.places == tuple(range(size)):
            return lambda: wait().view(size, -1)
        return lambda: wait().view(size, -1)[list(self.places)]

    def _ring_forward(self, transition: Tensor, update: Tensor, initial: Tensor) -> Arrived:
        before = initial if self.rank == 0 else self._receive(self.rank - 1, initial)
        behind = moved(transition, before, update)
        if self.rank < self.last:
            self._send([self.rank + 1], behind)
        final = None
        if self.returns:
            final = behind if self.rank == self.last else self._receive(self.last, behind)
            if self.rank == self.last:
                self._send(range(self.last), behind)
        return Arrived(before, final, (transition,))

    def _ring_backward(
        self, gradient: Tensor, final: Tensor | None, transitions: tuple[Tensor, ...]
    ) -> Tensor:
        if self.rank < self.last:
            if final is not None:
                self._send([self.last], final.contiguous())
            behind = self._receive(self.rank + 1, gradient)
        elif final is None:
            behind = torch.zeros_like(gradient)
        else:
            parts = [self._receive(rank, gradient) for rank in range(self.last)]
            behind = _in_order(torch.stack([*parts, final]))
        if self.rank > 0:
            self._send([self.rank - 1], moved_back(transitions[0], behind, gradient))
        return behind

    def _step(self, rank: int) -> int:
        return self.places[rank] - self.axis.rank

    def _send(self, ranks: list[int] | range, message: Tensor) -> None:
        flat = message.contiguous().view(-1)
        self.axis.exchange([(self._step(rank), flat) for rank in ranks], [])()

    def _receive(self, rank: int, like: Tensor) -> Tensor:
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        self.axis.exchange([], [(self._step(rank), out.view(-1))])()
        return out


def _in_order(parts: Tensor) -> Tensor:
    """Their sum, one after the other."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
