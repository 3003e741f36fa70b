"""A tensor of which the ranks share one dim, and know which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from usp.distributed.agreement import Facts, refuse_together
from usp.distributed.comm import untraced
from usp.distributed.mesh import SequenceMesh, check_mesh, degrees_and_place
from usp.planning.shares import shares
from usp.planning.switches import least_sent
from usp.sharding.in_graph import is_in_graph
from usp.sharding.positions import positions
from usp.sharding.switch import gather, split, switch
from usp.sharding.whole import agree_on_length, checked_dim


@dataclass(frozen=True, eq=False)
class DynamicShard:
    """This rank's part of a tensor, which dim of it the ranks share, and which they may share.

    A block that computes along a dim asks for it whole, and the least is done: nothing where it is
    whole, else one ``switch`` to the dim for which least is sent. It is a value: a block makes a
    new one (``with_local``) and hands it on. In one graph of ``torch.compile``.

    Make one with ``DynamicShard.split`` of what every rank holds whole, or with
    ``DynamicShard.of`` of parts.

    Attributes:
        local: This rank's part.
        dim: The dim that the ranks share.
        dims: Those that they may share, counted from the front.
        lengths: Of the whole along each of ``dims``.
        mesh: The ranks; None is one device.
        validate: Whether they compare their arguments at each switch; see
            ``long_context_attention``.

    Example:
        >>> x = DynamicShard.split(video, (1, 2), mesh)   # (B, T, S, C), shared along T
        >>> x = x.with_local(over_space(x.local))         # S is whole
        >>> x = x.whole(1)                                # one switch: T is whole, S is shared
        >>> x = x.with_local(over_time(x.local))
    """

    local: Tensor
    dim: int
    dims: tuple[int, ...]
    lengths: tuple[int, ...]
    mesh: SequenceMesh | None
    validate: bool | None = None

    @classmethod
    def split(
        cls,
        x: Tensor,
        dims: Sequence[int],
        mesh: SequenceMesh | None,
        dim: int | None = None,
        *,
        validate: bool | None = None,
    ) -> DynamicShard:
        """Of a tensor that every rank holds whole, this rank's part.

        Args:
            x: The whole, the same on every rank.
            dims: At least one: those that may be shared.
            mesh: The ranks; None is one device.
            dim: The one of them to begin with; by default the first.
            validate: As above.

        Raises:
            TypeError: no tensor, or a dim is no integer.
            ValueError: a dim is not there or named twice, or ``dim`` is none of ``dims``.
        """
        dims, dim = _checked(x, dims, dim)
        check_mesh(mesh)
        lengths = tuple(x.shape[each] for each in dims)
        return cls(split(x, dim, mesh), dim, dims, lengths, mesh, validate)

    @classmethod
    def of(
        cls,
        local: Tensor,
        dims: Sequence[int],
        mesh: SequenceMesh | None,
        dim: int | None = None,
        seq_len: int | None = None,
        *,
        validate: bool | None = None,
    ) -> DynamicShard:
        """Of the parts that the ranks hold already, cut as ``split`` cuts.

        Args:
            local: This rank's part.
            dims, mesh, dim, validate: As in ``split``.
            seq_len: Whole length of ``dim``; by default the ranks tell each other, this once.

        Raises:
            TypeError, ValueError: as ``split``; or this rank's share of ``seq_len`` is not what
                ``local`` holds, or ranks differ; names both.
        """
        try:
            dims, dim = _checked(local, dims, dim)
        except Exception as refusal:  # whatever it is, the others must not wait for this rank
            refuse_together(mesh, "usp.dsp.DynamicShard.of", validate, refusal)
            raise
        if seq_len is None or not is_in_graph(local, check_mesh(mesh)):
            seq_len = _agreed(local, mesh, dim, seq_len, validate, dims)
        lengths = tuple(seq_len if each == dim else local.shape[each] for each in dims)
        return cls(local, dim, dims, lengths, mesh, validate).with_local(local)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        whole = dict(zip(self.dims, self.lengths, strict=True))
        return tuple(whole.get(dim, length) for dim, length in enumerate(self.local.shape))

    def whole(self, *dims: int, to: int | None = None) -> DynamicShard:
        """The same tensor with these dims whole on every rank.

        Args:
            dims: Those that are computed along. Dims that may not be shared are always whole.
            to: The dim to share instead, where one of ``dims`` is shared now; by default that for
                which the rank that sends most sends least.

        Raises:
            ValueError: there is no such dim, all that may be shared are to be whole (``gather``),
                or ``to`` is none of the others.
        """
        try:
            others = self._others(dims, to)
        except (TypeError, ValueError) as refusal:
            refuse_together(self.mesh, "usp.dsp.switch", self.validate, refusal)
            raise
        if others is None:
            return self
        to = self._least_sent(others) if to is None else checked_dim(self.local, to)
        length = self.lengths[self.dims.index(self.dim)]
        local = switch(self.local, self.dim, to, self.mesh, length, validate=self.validate)
        return replace(self, local=local, dim=to)

    def _others(self, dims: tuple[int, ...], to: int | None) -> list[int] | None:
        """Dims that may be shared when ``dims`` are whole; None where these are."""
        asked = {checked_dim(self.local, dim) for dim in dims}
        others = [dim for dim in self.dims if dim not in asked]
        if to is not None and checked_dim(self.local, to) not in others:
            raise ValueError(
                f"dim {to} is to be shared, but only dims {others} may be: dims {self.dims} "
                f"were named, and {sorted(asked)} are to be whole"
            )
        if self.dim not in asked:
            return None
        if not others:
            raise ValueError(
                f"dims {sorted(asked)} are to be whole, and of dims {self.dims} none remains to "
                "be shared: ask for fewer, name more dims, or gather()"
            )
        return others

    def _least_sent(self, others: list[int]) -> int:
        index = self.dims.index
        degrees, _ = degrees_and_place(self.mesh)
        best = least_sent(self.lengths, index(self.dim), [index(dim) for dim in others], degrees)
        return self.dims[best]

    def with_local(self, local: Tensor) -> DynamicShard:
        """Another tensor that is shared in the same way: what a block made of this one.

        Args:
            local: As long as this rank's part along each of ``dims``; other dims may differ.

        Raises:
            TypeError: no tensor.
            ValueError: it is longer or shorter; names both.
        """
        degrees, _ = degrees_and_place(self.mesh)
        rank = 0 if self.mesh is None else self.mesh.rank
        for dim, length in zip(self.dims, self.lengths, strict=True):
            mine = shares("contiguous", length, *degrees)[rank] if dim == self.dim else length
            if local.shape[checked_dim(local, dim)] != mine:
                raise ValueError(
                    f"rank {rank} has {mine} of {length} along dim {dim}, but the tensor holds "
                    f"{local.shape[dim]}: shape {tuple(local.shape)}"
                )
        return replace(self, local=local)

    def positions(self, dim: int) -> Tensor:
        """(n,) int64: where along ``dim`` of the whole this rank's items are."""
        dim = checked_dim(self.local, dim)
        if dim == self.dim:
            return positions(self.shape[dim], self.mesh, device=self.local.device)
        return torch.arange(self.local.shape[dim], device=self.local.device)

    def gather(self) -> Tensor:
        """The whole, on every rank; see ``usp.dsp.gather``."""
        length = self.lengths[self.dims.index(self.dim)]
        return gather(self.local, self.dim, self.mesh, length, validate=self.validate)


@untraced
def _agreed(
    local: Tensor,
    mesh: SequenceMesh | None,
    dim: int,
    seq_len: int | None,
    validate: bool | None,
    dims: tuple[int, ...],
) -> int:
    """Whole length of ``dim``; the ranks meet."""

    def facts() -> Facts:
        return {"dims, and that which is shared": (dims, dim)}

    place = "usp.dsp.DynamicShard.of"
    return agree_on_length(place, local, mesh, dim, "contiguous", seq_len, validate, facts)[0]


def _flatten(shard: DynamicShard) -> tuple[list[Tensor], tuple[Any, ...]]:
    return [shard.local], tuple(getattr(shard, field.name) for field in fields(shard)[1:])


def _unflatten(children: Iterable[Any], context: Any) -> DynamicShard:
    (local,) = children
    return DynamicShard(local, *context)


# What wraps a module looks for the tensors that go in and out of it, as FSDP does to hang its hooks
# on them. Newer torch looks into dataclasses by itself.
register_pytree_node(DynamicShard, _flatten, _unflatten)


def _checked(x: Tensor, dims: Sequence[int], dim: int | None) -> tuple[tuple[int, ...], int]:
    """``dims`` and the one to begin with, counted from the front."""
    found = tuple(checked_dim(x, each) for each in dims)
    first = (found or (0,))[0] if dim is None else checked_dim(x, dim)
    if len(set(found)) != len(found) or first not in found:
        raise ValueError(
            f"dims must name each dim that may be shared once, and dim one of them, got "
            f"dims={tuple(dims)}, dim={dim} for a tensor of shape {tuple(x.shape)}"
        )
    return found, first
