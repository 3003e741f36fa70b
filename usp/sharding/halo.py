"""The tokens in front of this rank's own: for autograd, and as an op of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from usp.distributed.agreement import Facts, meet_in_backward
from usp.distributed.mesh import SequenceMesh, degrees_and_place, mesh_of
from usp.planning.halo import Halo, Piece, halo_of
from usp.planning.layout import Layout, from_told, told
from usp.planning.masks.bounds import check_cu_seqlens
from usp.planning.shares import shares
from usp.sharding import in_graph
from usp.sharding.whole import agree_on_length


@dataclass(frozen=True)
class Sequence1d:
    """Tokens in the order of the ranks, (B, local tokens, ...) on each.

    Attributes:
        mesh: The ranks; None is one device.
        layout: "contiguous" or ``Held``.
        seq_len: Tokens of the whole; None where the ranks have to ask.
        cu_seqlens: Boundaries ``(0, ..., seq_len)`` of documents, as they were given.
    """

    mesh: SequenceMesh | None
    layout: Layout
    seq_len: int | None
    cu_seqlens: Sequence[int] | Tensor | None

    @property
    def bounds(self) -> tuple[int, ...] | None:
        """Of documents; None is one."""
        return None if self.cu_seqlens is None else check_cu_seqlens(self.cu_seqlens)

    def documents(self, length: int) -> tuple[int, ...]:
        """Their boundaries, of a whole of that length.

        Raises:
            ValueError: they end elsewhere.
        """
        bounds = (0, length) if self.bounds is None else self.bounds
        if bounds[-1] != length:
            raise ValueError(
                f"cu_seqlens must end with the length of the whole sequence, {length}, got "
                f"{bounds[-1]}"
            )
        return bounds

    def first(self, length: int) -> tuple[int, ...]:
        """Of each rank the position of its first token, and behind them the length."""
        degrees, _ = degrees_and_place(self.mesh)
        return tuple(accumulate(shares(self.layout, length, *degrees), initial=0))

    def halo(self, length: int, left: int) -> Halo:
        """This rank's."""
        rank = self.mesh.rank if self.mesh else 0
        return halo_of(self.first(length), self.documents(length), left, rank)


def in_front(
    x: Tensor,
    sequence: Sequence1d,
    left: int,
    validate: bool | None,
    more: Callable[[], Facts],
) -> tuple[Tensor, int]:
    """(B, left, ...) in front of this rank's tokens, 0 where there are none of the same document;
    and tokens of the whole.

    Args:
        x: (B, local tokens, ...).
        validate, more: See ``agree_on_length``.
    """
    mesh = sequence.mesh
    length, name = _agree(x, sequence, left, validate, more)
    halo = sequence.halo(length, left)  # refuses
    if mesh is None or mesh.size == 1:
        return x.new_zeros(x.shape[0], left, *x.shape[2:]), length
    found = cast(Tensor, _InFront.apply(x.movedim(1, 0), mesh, halo))
    if name is not None:
        meet_in_backward(found, mesh, name)
    return found.movedim(0, 1), length


def in_front_in_graph(x: Tensor, sequence: Sequence1d, left: int, validate: bool | None) -> Tensor:
    """The same through the op; on several ranks, with a length that is named."""
    assert sequence.mesh is not None
    placed = *told(sequence.layout), sequence.seq_len, sequence.mesh.name
    settings = left, sequence.bounds, *placed
    return in_graph.call("halo", x.movedim(1, 0), *settings, validate=validate).movedim(0, 1)


def _agree(
    x: Tensor,
    sequence: Sequence1d,
    left: int,
    validate: bool | None,
    more: Callable[[], Facts],
) -> tuple[int, int | None]:
    def facts() -> Facts:
        return more() | {"tokens in front": left, "cu_seqlens": sequence.bounds}

    placed = sequence.layout, sequence.seq_len, validate
    return agree_on_length("usp.causal_conv1d", x, sequence.mesh, 1, *placed, facts)


def _fetch(x: Tensor, mesh: SequenceMesh, halo: Halo) -> Tensor:
    """(local tokens, ...) -> (left, ...)."""
    out = x.new_zeros(halo.left, *x.shape[1:])
    _exchange(mesh, [(p, x[p.start : p.stop]) for p in halo.send], out, halo.receive)
    return out


def _bring_back(grad: Tensor, local: int, mesh: SequenceMesh, halo: Halo) -> Tensor:
    """(left, ...) -> (local tokens, ...): the sums of what others made of them."""
    starts = [0, *accumulate(p.stop - p.start for p in halo.send)]
    came = grad.new_empty(starts[-1], *grad.shape[1:])
    pieces = [
        Piece(p.rank, start, start + p.stop - p.start)
        for p, start in zip(halo.send, starts[:-1], strict=True)
    ]
    _exchange(mesh, [(p, grad[p.start : p.stop]) for p in halo.receive], came, pieces)
    own = grad.new_zeros(local, *grad.shape[1:])
    for mine, piece in zip(halo.send, pieces, strict=True):
        own[mine.start : mine.stop] += came[piece.start : piece.stop]
    return own


def _exchange(
    mesh: SequenceMesh,
    send: Sequence[tuple[Piece, Tensor]],
    out: Tensor,
    receive: Sequence[Piece],
) -> None:
    """Send rows, and receive others into their places; ``out`` is contiguous."""
    axis, ranks = mesh.whole()

    def step(piece: Piece) -> int:
        return ranks.index(piece.rank) - axis.rank

    axis.exchange(
        [(step(piece), rows.contiguous().view(-1)) for piece, rows in send],
        [(step(piece), out[piece.start : piece.stop].view(-1)) for piece in receive],
    )()


class _InFront(torch.autograd.Function):
    """With derivatives of every order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: SequenceMesh, halo: Halo) -> Tensor:
        ctx.local, ctx.mesh, ctx.halo = x.shape[0], mesh, halo
        return _fetch(x, mesh, halo)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return cast(Tensor, _Home.apply(grad, ctx.local, ctx.mesh, ctx.halo)), None, None


class _Home(torch.autograd.Function):
    """The adjoint, likewise."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, local: int, mesh: SequenceMesh, halo: Halo) -> Tensor:
        ctx.mesh, ctx.halo = mesh, halo
        return _bring_back(grad, local, mesh, halo)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        return cast(Tensor, _InFront.apply(x, ctx.mesh, ctx.halo)), None, None, None


def _sequence(
    documents: Sequence[int] | None,
    layout: str,
    numbers: Sequence[int] | None,
    seq_len: int,
    mesh: str,
) -> Sequence1d:
    return Sequence1d(mesh_of(mesh), from_told(layout, numbers), seq_len, documents)


def _apply(x: Tensor, left: int, *rest: Any) -> tuple[Tensor, int | None]:
    *settings, validate, more = rest
    sequence = _sequence(*settings)
    length, name = _agree(x.movedim(0, 1), sequence, left, validate, more)
    assert sequence.mesh is not None
    return _fetch(x, sequence.mesh, sequence.halo(length, left)), name


def _adjoint(grad: Tensor, local: int, left: int, *settings: Any) -> Tensor:
    sequence = _sequence(*settings)
    assert sequence.mesh is not None and sequence.seq_len is not None
    return _bring_back(grad, local, sequence.mesh, sequence.halo(sequence.seq_len, left))


in_graph.register(
    in_graph.Collective(
        "halo",
        "int left, int[]? documents, str layout, int[]? numbers, SymInt seq_len, str mesh",
        _apply,
        _adjoint,
        lambda _, left, *__: left,
    )
)
