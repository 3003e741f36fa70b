"""A few rows of a spread sequence, and all of them a few places on: only what must crosses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from usp.distributed.comm import untraced
from usp.distributed.mesh import SequenceMesh, check_mesh
from usp.planning.layout import Layout, check_layout
from usp.planning.shares import named_lengths
from usp.sharding import rolling, taking
from usp.sharding.in_graph import is_in_graph


def take(
    x: Tensor,
    mesh: SequenceMesh | None,
    rows: Sequence[int] | Tensor,
    dim: int = 1,
    layout: Layout = "contiguous",
    seq_len: int | None = None,
    *,
    validate: bool | None = None,
) -> Tensor:
    """A few tokens of a spread sequence, on every rank: class tokens, registers.

    Just these tokens cross ranks: for n of N that this mesh row holds, this rank sends
    ``n (ulysses_degree - 1) + N (ring_degree - 1)`` of them, each of different ones once.

    The gradient is the adjoint, as that of ``unshard_sequence``: the sum of what every rank's copy
    got. So the loss of the whole is the sum over ranks; a loss that all ranks compute alike is
    divided by ``mesh.size`` first. Derivatives of every order.

    Args:
        x: (..., local tokens, ...), any dtype.
        mesh: The ranks that share the sequence; None is one device.
        rows: Global positions, in any order, also repeated; the same on every rank. Negative ones
            count from the end of the whole sequence.
        dim: The sequence dim.
        layout: As the sequence was cut.
        seq_len: Tokens of the whole; by default the sum of what the ranks hold.
        validate: Whether the ranks compare their arguments first; see ``long_context_attention``.
            A length that nobody named is asked for in any case.

    Returns:
        (..., len(rows), ...) in the order of ``rows``.

    Raises:
        TypeError: a row is no integer.
        ValueError: there is no such row, this rank's share of ``seq_len`` is not what ``x`` holds,
            or another rank refuses or was asked for something else; names both.
    """
    return _run(taking.take, taking.take_in_graph, x, mesh, rows, dim, layout, seq_len, validate)


def roll(
    x: Tensor,
    mesh: SequenceMesh | None,
    shift: int,
    dim: int = 1,
    layout: Layout = "contiguous",
    seq_len: int | None = None,
    *,
    validate: bool | None = None,
) -> Tensor:
    """``torch.roll`` over the whole of a spread sequence: the token of position p comes to stand
    at ``(p + shift) % seq_len``, wherever that is.

    For shifted windows, what reaches over the edge of a shard (a causal convolution adds rolled
    ones and hides those that came round), and targets (``roll(tokens, mesh, -1)``). Just the
    tokens that change rank cross: once along the axis of the mesh on which their rank changes,
    along both where it does on both. The gradient rolls back. Derivatives of every order.

    Args:
        x: (..., local tokens, ...), any dtype.
        mesh: The ranks that share the sequence; None is one device.
        shift: Places, also negative or more than there are; the same on every rank.
        dim: The sequence dim.
        layout: As the sequence was cut.
        seq_len: Tokens of the whole; by default the sum of what the ranks hold.
        validate: Whether the ranks compare their arguments first; see ``long_context_attention``.
            A length that nobody named is asked for in any case.

    Returns:
        (..., local tokens, ...).

    Raises:
        TypeError: ``shift`` is no integer.
        ValueError: this rank's share of ``seq_len`` is not what ``x`` holds, or another rank
            refuses or was asked for something else; names both.
    """
    return _run(rolling.roll, rolling.roll_in_graph, x, mesh, shift, dim, layout, seq_len, validate)


def _run(
    eager: Callable[..., Tensor],
    graph: Callable[..., Tensor],
    x: Tensor,
    mesh: SequenceMesh | None,
    what: Any,
    dim: int,
    layout: Layout,
    seq_len: int | None,
    validate: bool | None,
) -> Tensor:
    """One of the two ways; a graph cannot ask for a length that nobody named, and ends there."""
    if is_in_graph(x, check_mesh(mesh)):
        named = named_lengths(seq_len, check_layout(layout))
        if named is not None:
            return graph(x, mesh, what, dim, layout, named[0], validate)
    run = eager if mesh is None or mesh.size == 1 else untraced(eager)
    return run(x, mesh, what, dim, layout, seq_len, validate)
