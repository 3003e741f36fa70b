"""Mean and variance over all tokens of a spread sequence, for norms that look across tokens.

Each rank reduces its own part to a count, means and sums of squared distances from them. These
are gathered, and every rank joins them by the same sums in the same order: no square of a mean is
subtracted from a mean of squares, and the results are equal to the bit on all ranks.

Source: the parallel formula of Chan, Golub and LeVeque, 1979 (STAN-CS-79-773).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from usp.distributed.agreement import (
    Facts,
    check_on_all_ranks,
    check_when,
    meet_in_backward,
    meets,
    new_name,
)
from usp.distributed.comm import untraced
from usp.distributed.mesh import SequenceMesh, check_mesh, mesh_of
from usp.planning.kinds import device_type, flag, integer, real
from usp.planning.problem import state_dtype
from usp.sharding import in_graph
from usp.sharding.collectives import Gather, gather, reduce_scatter
from usp.sharding.in_graph import is_in_graph
from usp.sharding.whole import checked_dim


def mean(
    x: Tensor,
    mesh: SequenceMesh | None,
    dim: int | Sequence[int] = 1,
    *,
    keepdim: bool = False,
    validate: bool | None = None,
) -> Tensor:
    """``torch.mean`` over all tokens of a spread sequence, on every rank.

    Args:
        x, mesh, dim, keepdim, validate: See ``var_mean``.

    Returns:
        As ``torch.mean`` of the whole, in the dtype of x.

    Raises:
        TypeError, ValueError: see ``var_mean``.
    """
    return _reduce("usp.mean", x, mesh, dim, (0, keepdim), validate)[1]


def var(
    x: Tensor,
    mesh: SequenceMesh | None,
    dim: int | Sequence[int] = 1,
    *,
    correction: float = 1,
    keepdim: bool = False,
    validate: bool | None = None,
) -> Tensor:
    """``torch.var`` over all tokens of a spread sequence, on every rank.

    Args:
        x, mesh, dim, correction, keepdim, validate: See ``var_mean``.

    Returns:
        As ``torch.var`` of the whole, in the dtype of x.

    Raises:
        TypeError, ValueError: see ``var_mean``.
    """
    return _reduce("usp.var", x, mesh, dim, (correction, keepdim), validate)[0]


def var_mean(
    x: Tensor,
    mesh: SequenceMesh | None,
    dim: int | Sequence[int] = 1,
    *,
    correction: float = 1,
    keepdim: bool = False,
    validate: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch.var_mean`` over all tokens of a spread sequence, on every rank.

    Every element counts the same, whichever rank holds how many: neither a layout nor a length is
    needed. A rank's part is summed in fp32 (fp64 for fp64), and the parts are joined in fp64. For
    K numbers in the result a rank sends 8 (2 K + 1) bytes to each other rank of its mesh row, and
    those of the row to each other row; a backward sends as much.

    The gradient is that of the whole model: of each rank's tokens by what all ranks made of the
    result. So the loss of the whole is the sum over ranks; a loss that all ranks compute alike
    from these is divided by ``mesh.size`` first. Derivatives of every order.

    Args:
        x: Floating point, (..., local tokens, ...); ranks may hold any number of tokens, also 0.
        mesh: The ranks that share the sequence; None is one device.
        dim: The sequence dim, or several dims with it among them.
        correction: Elements to subtract from their number in the divisor of the variance.
        keepdim: Whether the reduced dims stay, with size 1.
        validate: Whether the ranks compare their arguments first; see ``long_context_attention``.

    Returns:
        Variance and mean of the whole, in the dtype of x; NaN where there is nothing to divide by.

    Raises:
        TypeError: x is no plain tensor, ``dim`` or ``correction`` no number.
        ValueError: x is not floating point, there is no such dim, or the ranks differ in anything
            but the number of tokens; names both.
    """
    return _reduce("usp.var_mean", x, mesh, dim, (correction, keepdim), validate)


class _Moments(NamedTuple):
    """Of one part each: (parts, K) but for the number of its elements, (parts, 1)."""

    number: Tensor
    mean: Tensor
    squares: Tensor  # sums of squared distances from the mean


def _reduce(
    place: str,
    x: Tensor,
    mesh: SequenceMesh | None,
    dim: int | Sequence[int],
    options: tuple[float, bool],
    validate: bool | None,
) -> tuple[Tensor, Tensor]:
    """Variance and mean; options: correction and keepdim."""
    run = untraced(_joined)
    mesh = check_mesh(mesh)
    if mesh is None or mesh.size == 1 or is_in_graph(x, mesh):
        run = _joined
    return run(place, x, mesh, dim, options, validate)


def _joined(
    place: str,
    x: Tensor,
    mesh: SequenceMesh | None,
    dim: int | Sequence[int],
    options: tuple[float, bool],
    validate: bool | None,
) -> tuple[Tensor, Tensor]:
    def check() -> _Asked:
        check_when(validate)
        return _asked(place, x, dim, *options)

    if mesh is not None and is_in_graph(x, mesh):
        asked = check()
        parts = _of_all_in_graph(_own(x, asked.dims), mesh, asked, validate)
    else:
        asked, name = _agree(place, check, mesh, validate, lambda: _more(x))
        parts = _own(x, asked.dims)
        if mesh is not None and mesh.size > 1:
            parts = _of_all(parts, mesh, name)
    total = parts.number.sum(0)
    mean = (parts.number * parts.mean).sum(0) / total
    squares = (parts.squares + parts.number * (parts.mean - mean).square()).sum(0)
    found = [squares / (total - asked.correction).clamp_min(0), mean]
    shape = [1 if i in asked.dims else size for i, size in enumerate(x.shape)]
    if not asked.keepdim:
        shape = list(asked.beside)
    variance, mean = (part.view(shape).to(x.dtype) for part in found)
    return variance, mean


class _Asked(NamedTuple):
    """What all ranks must ask for alike, as a graph can hold it.

    Attributes:
        place: Of agreement.PLACES.
        dims, beside: Those to reduce, counted from the front, and sizes of the others.
        correction, keepdim, dtype: As given, and of x.
    """

    place: str
    dims: tuple[int, ...]
    beside: tuple[int, ...]
    correction: float
    keepdim: bool
    dtype: str


def _asked(
    place: str, x: Tensor, dim: int | Sequence[int], correction: float, keepdim: bool
) -> _Asked:
    dims = _checked_dims(x, dim)
    beside = tuple(size for i, size in enumerate(x.shape) if i not in dims)
    correction, keepdim = real("correction", correction), flag("keepdim", keepdim)
    return _Asked(place, dims, beside, correction, keepdim, str(x.dtype))


def _more(x: Tensor) -> Facts:
    needed = torch.is_grad_enabled() and x.requires_grad
    return {"device type": device_type(x), "gradient needed": needed}


def _agree(
    place: str,
    check: Callable[[], _Asked],
    mesh: SequenceMesh | None,
    validate: bool | None,
    more: Callable[[], Facts],
) -> tuple[_Asked, int | None]:
    """What is asked for, and a name for this call where the ranks have met.

    Args:
        more: What else all ranks must agree on.
    """
    if mesh is None or not meets(mesh, validate, False):
        return check(), None

    def facts(asked: _Asked) -> Facts:
        return {
            "dim": asked.dims,
            "dims beside those": asked.beside,
            "correction": asked.correction,
            "keepdim": asked.keepdim,
            "dtype": asked.dtype,
        } | more()

    asked, told = check_on_all_ranks(mesh, place, check, facts, lambda: (new_name(),))
    return asked, told[0][0]


def _checked_dims(x: Tensor, dim: int | Sequence[int]) -> tuple[int, ...]:
    given = dim if isinstance(dim, Sequence) else (dim,)
    dims = tuple(checked_dim(x, integer("dim", d)) for d in given)
    if not dims or len(set(dims)) < len(dims):
        raise ValueError(f"dim must name different dims of {tuple(x.shape)}, got {dim}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}: use x.float()")
    return dims


def _own(x: Tensor, dims: tuple[int, ...]) -> _Moments:
    """This rank's part, (1, ...) fp64."""
    x = x.to(state_dtype(x.dtype))
    count = torch.Size(x.shape[i] for i in dims).numel()
    if count:
        variance, mean = torch.var_mean(x, dims, correction=0)
    else:  # sums of nothing, 0 and part of the graph
        variance = mean = x.sum(dims)
    counted = torch.full((1, 1), count, dtype=torch.float64, device=x.device)
    mean = mean.double().reshape(1, -1)
    return _Moments(counted, mean, variance.double().reshape(1, -1) * count)


def _of_all(parts: _Moments, mesh: SequenceMesh, name: int | None) -> _Moments:
    """The parts of all ranks, in one message along each axis."""
    everyone = cast(Tensor, Gather.apply(torch.cat(parts, 1), mesh, _one_each(mesh)))
    if name is not None:
        meet_in_backward(everyone, mesh, name)
    return _split(everyone)


def _of_all_in_graph(
    parts: _Moments, mesh: SequenceMesh, asked: _Asked, validate: bool | None
) -> _Moments:
    """The same through the op."""
    told = torch.cat(parts, 1)
    return _split(in_graph.call("gather_moments", told, *asked, mesh.name, validate=validate))


def _split(everyone: Tensor) -> _Moments:
    values = (everyone.shape[1] - 1) // 2
    return _Moments(*everyone.split((1, values, values), 1))


def _one_each(mesh: SequenceMesh) -> list[list[int]]:
    return [[1] * mesh.ulysses_degree] * mesh.ring_degree


def _apply(told: Tensor, *settings: Any) -> tuple[Tensor, int | None]:
    *given, mesh, validate, more = settings
    asked, on = _Asked(*given), mesh_of(mesh)
    asked = asked._replace(dims=tuple(asked.dims), beside=tuple(asked.beside))

    def others() -> Facts:
        return {"device type": device_type(told)} | more()

    _, name = _agree(asked.place, lambda: asked, on, validate, others)
    return gather(on, told, _one_each(on)), name


def _adjoint(grad: Tensor, _local: int, *settings: Any) -> Tensor:
    on = mesh_of(settings[-1])
    return reduce_scatter(on, grad, _one_each(on))


in_graph.register(
    in_graph.Collective(
        "gather_moments",
        "str place, int[] dims, SymInt[] beside, float correction, bool keepdim, str dtype, "
        "str mesh",
        _apply,
        _adjoint,
        lambda local, *settings: mesh_of(settings[-1]).size,
    )
)
