"""A few rows of a spread sequence on every rank: for autograd, and as an op of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from usp.distributed.agreement import Facts, meet_in_backward
from usp.distributed.mesh import SequenceMesh, degrees_and_place, mesh_of
from usp.planning.kinds import graph_integer, integer
from usp.planning.layout import Layout, from_told, told
from usp.planning.shares import owners
from usp.sharding import in_graph
from usp.sharding.collectives import Gather, gather, reduce_scatter
from usp.sharding.whole import agree_on_length, checked_dim

Rows = Sequence[int] | Tensor


def take(
    x: Tensor,
    mesh: SequenceMesh | None,
    rows: Rows,
    dim: int,
    layout: Layout,
    seq_len: int | None,
    validate: bool | None,
) -> Tensor:
    """``usp.take``; arguments and result as there."""
    found, length, name = _agree(x, mesh, rows, dim, layout, seq_len, validate)
    dim = checked_dim(x, dim)
    if mesh is None or mesh.size == 1:
        return x.index_select(dim, torch.tensor(found, dtype=torch.int64, device=x.device))
    taken = _taken(found, mesh, layout, length, x.device)
    local = x.index_select(dim, taken.mine).movedim(dim, 0)
    joined = cast(Tensor, Gather.apply(local, mesh, taken.held))
    if name is not None:
        meet_in_backward(joined, mesh, name)
    return joined.index_select(0, taken.place).movedim(0, dim)


def take_in_graph(
    x: Tensor,
    mesh: SequenceMesh,
    rows: Rows,
    dim: int,
    layout: Layout,
    seq_len: int,
    validate: bool | None,
) -> Tensor:
    """The same through the op; which rows these are is read when it runs."""
    dim = checked_dim(x, dim)
    asked = rows.clone() if isinstance(rows, Tensor) else _numbers(rows)
    settings = asked, dim, *told(layout), seq_len, mesh.name
    return in_graph.call("take", x.movedim(dim, 0), *settings, validate=validate).movedim(0, dim)


class _Taken(NamedTuple):
    """Which rows cross, and where they come to stand.

    Attributes:
        mine: (n,) int64 of this rank's own, each once.
        held: Rows that each rank of each mesh row gives.
        place: Of each row that was asked for, where it is when those of all ranks are joined.
    """

    mine: Tensor
    held: Sequence[Sequence[int]]
    place: Tensor


def _taken(
    rows: Sequence[int], mesh: SequenceMesh, layout: Layout, length: int, device: torch.device
) -> _Taken:
    wanted, place = torch.tensor(rows, dtype=torch.int64, device="cpu").unique(return_inverse=True)
    degrees, _ = degrees_and_place(mesh)
    owner, index = owners(layout, length, degrees, wanted)
    held = owner.bincount(minlength=mesh.size).view(degrees).tolist()
    # the joined ones are in the order of the ranks, and each one's in that of positions
    place = owner.argsort(stable=True).argsort()[place]
    return _Taken(index[owner == mesh.rank].to(device), held, place.to(device))


def _agree(
    x: Tensor,
    mesh: SequenceMesh | None,
    rows: Rows,
    dim: int,
    layout: Layout,
    seq_len: int | None,
    validate: bool | None,
    more: Callable[[], Facts] = dict,
) -> tuple[list[int], int, int | None]:
    """Global positions of the rows, tokens of the whole, and the name of a call that met.

    Args:
        more: What else all ranks must agree on.
    """
    asked: list[int] = []

    def facts() -> Facts:
        asked.extend(_integers(rows))
        return {"rows": asked} | more()

    length, name = agree_on_length("usp.take", x, mesh, dim, layout, seq_len, validate, facts)
    for row in asked:
        if not -length <= row < length:
            raise ValueError(f"there is no row {row} in a sequence of {length} tokens")
    return [row % length for row in asked], length, name


def _integers(rows: Rows) -> list[int]:
    if isinstance(rows, Tensor) and rows.dim() == 1:
        rows = cast("list[int]", rows.tolist())
    return [integer("a row", row) for row in _checked(rows)]


def _numbers(rows: Rows) -> Tensor:
    asked = [graph_integer("a row", row) for row in _checked(rows)]
    return torch.tensor(asked, dtype=torch.int64, device="cpu")


def _checked(rows: Rows) -> Sequence[int]:
    if isinstance(rows, Tensor | str) or not isinstance(rows, Sequence | range):
        raise TypeError(f"rows must be a list of positions, got {rows!r}")
    return rows


def _apply(
    x: Tensor,
    rows: Tensor,
    dim: int,
    layout: str,
    numbers: Sequence[int] | None,
    seq_len: int,
    mesh: str,
    validate: bool | None,
    more: Callable[[], Facts],
) -> tuple[Tensor, int | None]:
    on, placed = mesh_of(mesh), from_told(layout, numbers)
    found, length, name = _agree(x.movedim(0, dim), on, rows, dim, placed, seq_len, validate, more)
    taken = _taken(found, on, placed, length, x.device)
    joined = gather(on, x.index_select(0, taken.mine), taken.held)
    return joined.index_select(0, taken.place), name


def _adjoint(
    grad: Tensor,
    local: int,
    rows: Tensor,
    dim: int,
    layout: str,
    numbers: Sequence[int] | None,
    seq_len: int,
    mesh: str,
) -> Tensor:
    on, rest = mesh_of(mesh), grad.shape[1:]
    found = [row % seq_len for row in rows.tolist()]
    taken = _taken(found, on, from_told(layout, numbers), seq_len, grad.device)
    joined = grad.new_zeros((sum(map(sum, taken.held)), *rest)).index_add_(0, taken.place, grad)
    own = reduce_scatter(on, joined, taken.held)
    return grad.new_zeros((local, *rest)).index_add_(0, taken.mine, own)


in_graph.register(
    in_graph.Collective(
        "take",
        "Tensor rows, int dim, str layout, int[]? numbers, SymInt seq_len, str mesh",
        _apply,
        _adjoint,
        lambda local, rows, *_: rows.shape[0],
    )
)
