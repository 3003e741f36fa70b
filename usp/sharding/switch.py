"""Another dim of a tensor comes to be shared by the ranks: one exchange, differentiable.

Source: DSP, dynamic sequence parallelism, arXiv:2403.10266.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from usp.distributed.agreement import Facts, meet_in_backward
from usp.distributed.comm import untraced
from usp.distributed.mesh import SequenceMesh, check_mesh, degrees_and_place, mesh_of
from usp.ops.pack import pack, unpack
from usp.planning.shares import shares
from usp.sharding import in_graph
from usp.sharding.in_graph import is_in_graph
from usp.sharding.sequence import shard_sequence, unshard_sequence
from usp.sharding.whole import agree_on_length, checked_dim

Pair = tuple[int, int]


def split(x: Tensor, dim: int, mesh: SequenceMesh | None) -> Tensor:
    """This rank's part, along ``dim``, of a tensor that every rank holds whole.

    ``usp.shard_sequence`` with the contiguous layout, and its gradient: zero at others' parts.

    Args:
        x: Any shape and dtype, the same on every rank.
        dim: The dim that the ranks share from now on.
        mesh: The ranks; None is one device.

    Returns:
        The part, contiguous.

    Raises:
        TypeError, ValueError: ``x``, ``dim`` or ``mesh`` is something else.
    """
    return shard_sequence(x, mesh, dim)


def gather(
    x: Tensor,
    dim: int,
    mesh: SequenceMesh | None,
    seq_len: int | None = None,
    *,
    validate: bool | None = None,
) -> Tensor:
    """The whole tensor, on every rank.

    ``usp.unshard_sequence`` with the contiguous layout, and its gradient: the sum of what every
    rank's copy got, so that a loss which all ranks compute alike is divided by ``mesh.size``.

    Args:
        x: This rank's part.
        dim: The dim that the ranks share.
        mesh, seq_len, validate: See ``switch``.

    Raises:
        TypeError, ValueError: as ``switch``.
    """
    return unshard_sequence(x, mesh, dim, "contiguous", seq_len, validate=validate)


def switch(
    x: Tensor,
    src_dim: int,
    dst_dim: int,
    mesh: SequenceMesh | None,
    seq_len: int | None = None,
    *,
    validate: bool | None = None,
) -> Tensor:
    """Make ``src_dim`` whole on every rank and share ``dst_dim`` instead, in one all-to-all.

    Of T items along ``src_dim`` rank i holds t_i, and of S along ``dst_dim`` it gets s_i, by the
    rule of ``shard_sequence`` (the first ones one more where they do not divide, some none where
    they are fewer than ranks). It sends exactly ``t_i (S - s_i)`` times the bytes that lie at each
    of these places; nothing is padded. The gradient switches back. Derivatives of every order.

    Args:
        x: (..., t_i, ..., S, ...): this rank's part along ``src_dim``, whole along ``dst_dim``,
            which may stand in either order. Any dtype.
        src_dim: The dim that the ranks share.
        dst_dim: The dim that they are to share.
        mesh: The ranks that share it, all of them in one exchange, whatever its shape; None is
            one device. One axis of a larger mesh is ``SequenceMesh.from_device_mesh(device_mesh,
            ring=None, ulysses=its name)``.
        seq_len: T, the whole length of ``src_dim``; by default the sum of what the ranks hold,
            which they tell each other at this call.
        validate: Whether the ranks compare their arguments first; see ``long_context_attention``.
            A length that nobody named is asked for in any case.

    Returns:
        (..., T, ..., s_i, ...), contiguous on a mesh of several ranks.

    Raises:
        TypeError: a dim is no integer, or ``x`` no plain tensor.
        ValueError: a dim is not there, both are the same, this rank's share of ``seq_len`` is not
            what ``x`` holds, or another rank refuses or was asked for something else; names both.

    Source:
        The dynamic switch of arXiv:2403.10266, section 3.
    """
    run = _switch
    if is_in_graph(x, check_mesh(mesh)):
        run = untraced(_switch) if seq_len is None else cast(Any, _switch_in_graph)
    elif mesh is not None and mesh.size > 1:
        run = untraced(_switch)
    return run(x, src_dim, dst_dim, mesh, seq_len, validate)


def _switch(
    x: Tensor,
    src_dim: int,
    dst_dim: int,
    mesh: SequenceMesh | None,
    seq_len: int | None,
    validate: bool | None,
) -> Tensor:
    length, name = _agree(x, src_dim, dst_dim, mesh, seq_len, validate)
    if mesh is None or mesh.size == 1:
        return x
    dims = _checked_dims(x, src_dim, dst_dim)
    out = cast(Tensor, _Switch.apply(x, mesh, dims, (length, x.shape[dims[1]])))
    if name is not None:
        meet_in_backward(out, mesh, name)
    return out


def _agree(
    x: Tensor,
    src_dim: int,
    dst_dim: int,
    mesh: SequenceMesh | None,
    seq_len: int | None,
    validate: bool | None,
    more: Callable[[], Facts] = dict,
) -> tuple[int, int | None]:
    """Whole length of ``src_dim``, and the name of a call that met."""

    def facts() -> Facts:
        return {"src_dim and dst_dim": _checked_dims(x, src_dim, dst_dim)} | more()

    place = "usp.dsp.switch"
    return agree_on_length(place, x, mesh, src_dim, "contiguous", seq_len, validate, facts)


def _checked_dims(x: Tensor, src_dim: int, dst_dim: int) -> Pair:
    """Both counted from the front.

    Raises:
        ValueError: they are the same.
    """
    src, dst = checked_dim(x, src_dim), checked_dim(x, dst_dim)
    if src == dst:
        raise ValueError(
            f"src_dim {src_dim} and dst_dim {dst_dim} are one dim of a tensor of shape "
            f"{tuple(x.shape)}: name the dim to be shared next"
        )
    return src, dst


class _Switch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: SequenceMesh, dims: Pair, lengths: Pair) -> Tensor:
        ctx.mesh, ctx.dims, ctx.lengths = mesh, dims, lengths
        return _exchanged(x, mesh, dims, lengths)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        back = cast(Tensor, _Switch.apply(grad, ctx.mesh, ctx.dims[::-1], ctx.lengths[::-1]))
        return back, None, None, None


def _exchanged(x: Tensor, mesh: SequenceMesh, dims: Pair, lengths: Pair) -> Tensor:
    """The exchange itself.

    Where nothing but dims of size 1 stands before a dim that is cut, its pieces lie one behind
    the other in memory as they do in a message, and none is copied.

    Args:
        x: (..., own items, ..., all items, ...).
        dims: That which is shared, and that which is to be.
        lengths: Of the whole, along each.
    """
    (src, dst), (degrees, _) = dims, degrees_and_place(mesh)
    of_src, of_dst = (shares("contiguous", length, *degrees) for length in lengths)
    shape = list(x.shape)
    shape[src], shape[dst] = lengths[0], of_dst[mesh.rank]
    if not prod(lengths) * prod(x.shape[dim] for dim in range(x.dim()) if dim not in dims):
        return x.new_empty(shape)  # nobody has anything
    axis, order = mesh.whole()
    in_order = order == tuple(range(mesh.size))
    x = x.resolve_conj().resolve_neg()
    of_ranks = x.split(of_dst, dst)
    pieces = [of_ranks[rank] for rank in order]
    if in_order and prod(x.shape[:dst]) == 1 and x.is_contiguous():
        message = x.flatten().view(torch.uint8)
    else:
        message = pack(pieces)
    width = x.element_size() * prod(n for dim, n in enumerate(shape) if dim != src)
    sizes = [piece.nbytes for piece in pieces], [of_src[rank] * width for rank in order]
    came = axis.all_to_all(message, *sizes)
    if in_order and prod(shape[:src]) == 1:
        return came.view(x.dtype).view(shape)
    out = x.new_empty(shape)
    of_ranks = out.split(of_src, src)
    unpack(came, [of_ranks[rank] for rank in order])
    return out


def _switch_in_graph(
    x: Tensor,
    src_dim: int,
    dst_dim: int,
    mesh: SequenceMesh,
    seq_len: int,
    validate: bool | None,
) -> Tensor:
    """The same through the op, which takes and gives rows: places along both dims."""
    dims = _checked_dims(x, src_dim, dst_dim)
    both_first = x.movedim(dims, (0, 1))
    length, rest = both_first.shape[1], both_first.shape[2:]
    settings = *dims, length, seq_len, mesh.name
    rows = in_graph.call("switch", both_first.flatten(0, 1), *settings, validate=validate)
    share = _share(length, mesh)
    return rows.view(seq_len, share, *rest).movedim((0, 1), dims).contiguous()


def _share(length: int, mesh: SequenceMesh) -> int:
    """Items of this rank."""
    return shares("contiguous", length, *degrees_and_place(mesh)[0])[mesh.rank]


def _apply(
    x: Tensor,
    src: int,
    dst: int,
    length: int,
    seq_len: int,
    mesh: str,
    validate: bool | None,
    more: Callable[[], Facts],
) -> tuple[Tensor, int | None]:
    on, dims = mesh_of(mesh), (src, dst)
    held = x.shape[0] // length if length else _share(seq_len, on)
    given = x.view(held, length, *x.shape[1:]).movedim((0, 1), dims)
    _, name = _agree(given, src, dst, on, seq_len, validate, more)
    return _rows(_exchanged(given, on, dims, (seq_len, length)), dims), name


def _adjoint(
    grad: Tensor, local: int, src: int, dst: int, length: int, seq_len: int, mesh: str
) -> Tensor:
    on, dims = mesh_of(mesh), (src, dst)
    given = grad.view(seq_len, _share(length, on), *grad.shape[1:]).movedim((0, 1), dims)
    return _rows(_exchanged(given, on, (dst, src), (length, seq_len)), dims)


def _rows(x: Tensor, dims: Sequence[int]) -> Tensor:
    return x.movedim(tuple(dims), (0, 1)).flatten(0, 1)


in_graph.register(
    in_graph.Collective(
        "switch",
        "int src, int dst, SymInt length, SymInt seq_len, str mesh",
        _apply,
        _adjoint,
        lambda local, src, dst, length, seq_len, mesh: seq_len * _share(length, mesh_of(mesh)),
    )
)
