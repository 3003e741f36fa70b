"""How long the whole is of which each rank holds a part: checked by all ranks together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from usp.distributed.agreement import (
    LENGTH_ADVICE,
    Advised,
    Facts,
    check_on_all_ranks,
    check_when,
    meets,
    new_name,
)
from usp.distributed.mesh import SequenceMesh, check_mesh, degrees_and_place
from usp.planning.kinds import device_type, integer, tensor
from usp.planning.layout import Held, Layout, check_layout
from usp.planning.shares import named_lengths, shares, summed_length


def checked_dim(x: Tensor, dim: int) -> int:
    """``dim`` counted from the front.

    Raises:
        TypeError, NotImplementedError: ``x`` is no plain tensor, or ``dim`` no integer.
        ValueError: there is no such dim.
    """
    tensor("x", x)
    dim = integer("dim", dim)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"there is no dim {dim} in a tensor of shape {tuple(x.shape)}")
    return dim % x.dim()


def agree_on_length(
    place: str,
    x: Tensor,
    mesh: SequenceMesh | None,
    dim: int,
    layout: Layout,
    seq_len: int | None,
    validate: bool | None,
    more: Callable[[], Facts] = dict,
) -> tuple[int, int | None]:
    """Tokens of the whole sequence, and a name for this call where the ranks have met.

    A length that neither ``seq_len`` nor the layout says is asked for, whatever ``validate``: no
    rank can tell it from what it holds itself.

    Args:
        place: In the program, one of ``agreement.PLACES``.
        x, dim: What this rank holds, and its dim of tokens.
        mesh, layout, seq_len: Who shares it, how, and how long it is.
        validate: As in ``agreement.meets``.
        more: Checks more, and says what else all ranks must agree on.

    Raises:
        TypeError, ValueError, NotImplementedError: what does not fit, on every rank that meets.
    """

    def check() -> tuple[int | None, Facts]:
        check_when(validate)
        axis = checked_dim(x, dim)
        check_layout(layout)
        whole = None if seq_len is None else integer("seq_len", seq_len, least=0)
        named = named_lengths(whole, layout)
        length = None if named is None else named[0]
        if length is not None:
            _check_share(x.shape[axis], mesh, dim, layout, length)
        return length, _facts(x, axis, layout, length) | more()

    check_mesh(mesh)
    asks = seq_len is None and isinstance(layout, str)
    if mesh is None or not meets(mesh, None if asks else validate, asks):
        length, _ = check()
        if length is None:  # there is one rank
            length = x.shape[dim]
            _check_share(length, mesh, dim, layout, length)
        return length, None
    (length, _), told = check_on_all_ranks(
        mesh, place, check, lambda found: found[1], lambda: (x.shape[dim], new_name())
    )
    if length is None:
        held = [tokens for tokens, *_ in told]
        length = summed_length("x", held, layout, degrees_and_place(mesh)[0])
    return length, told[0][1]


def held(length: int, mesh: SequenceMesh | None) -> Held:
    """The layout of tokens as they are, which the ranks tell each other: 48 bytes along each axis.

    Ask once where a part of a model begins whose ranks hold what they happen to hold, and pass it
    as ``layout=`` to all inside. It knows the length of the whole, too.

    Args:
        length: Tokens that this rank holds.
        mesh: The ranks that share the sequence, all of which call this; None is one device.

    Raises:
        TypeError, ValueError: a rank's ``length`` is no integer of at least 0.

    Example:
        >>> layout = usp.held(x.shape[1], mesh)
        >>> out = usp.long_context_attention(q, k, v, mesh, layout=layout)
    """

    return Held(ask_lengths(length, mesh))


def ask_lengths(
    length: int, mesh: SequenceMesh | None, more: Callable[[], Facts] = dict
) -> tuple[int, ...]:
    """Tokens that each rank holds, told by all of them.

    Args:
        length, mesh: See ``held``.
        more: Checks more, and says what else all ranks must agree on.
    """

    def check() -> tuple[int, Facts]:
        if integer("length", length, least=0) >= 2**63:
            raise ValueError(f"length must be below 2**63, got {length}")
        return length, more()

    if check_mesh(mesh) is None or mesh is None or mesh.size == 1:
        return (check()[0],)
    place, numbers = "usp.held", lambda: (length,)
    _, told = check_on_all_ranks(mesh, place, check, lambda found: found[1], numbers)
    return tuple(count for count, *_ in told)


def _check_share(
    held: int, mesh: SequenceMesh | None, dim: int, layout: Layout, seq_len: int
) -> None:
    """Refuse where this rank holds something else than its share."""
    degrees, _ = degrees_and_place(mesh)
    rank = 0 if mesh is None else mesh.rank
    mine = shares(layout, seq_len, *degrees)[rank]
    if held != mine:
        raise ValueError(
            f"rank {rank} holds {held} tokens along dim {dim}, but layout {layout} "
            f"gives it {mine} of {seq_len}: pass seq_len= of the whole sequence"
        )


def _facts(x: Tensor, dim: int, layout: Layout, seq_len: int | None) -> Facts:
    return {
        "seq_len": Advised("not given" if seq_len is None else seq_len, LENGTH_ADVICE),
        "dims beside the sequence": (*x.shape[:dim], "tokens", *x.shape[dim + 1 :]),
        "dtype": x.dtype,
        "device type": device_type(x),
        "layout": layout,
        "gradient needed": torch.is_grad_enabled() and x.requires_grad,
    }
