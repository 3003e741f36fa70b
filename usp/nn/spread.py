"""A part of a model in which a sequence is spread over ranks, as one value."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from usp import rng
from usp.attention.functional import long_context_attention
from usp.distributed.agreement import Facts, When, meet_in_place_of, refuse_together
from usp.distributed.mesh import SequenceMesh, check_mesh, degrees_and_place
from usp.planning.kinds import integer
from usp.planning.layout import Held, Layout, check_layout
from usp.planning.masks.bounds import check_cu_seqlens
from usp.planning.shares import shares, summed_length
from usp.sharding.rows import roll, take
from usp.sharding.sequence import positions, shard_sequence, unshard_sequence
from usp.sharding.statistics import mean, var, var_mean
from usp.sharding.whole import ask_lengths, checked_dim


@dataclass(frozen=True)
class Spread:
    """Who shares a sequence, which token is where, how long the whole is, where documents end.

    Make one where a sharded part begins, in every forward whose length or documents are new, and
    hand it to all inside, as one hands on positions or a mask: nothing inside asks for the length
    again, and nothing guesses it. It is a value: it holds no tensors, nothing of it changes, and
    what is computed again (activation checkpoints) is computed with the same one.

    Args:
        mesh: The ranks; None is one device.
        layout: Which token is where.
        seq_len: Tokens of the whole. Need not be given where ``layout`` or ``cu_seqlens`` says it;
            where only the ranks together know it, ask them: ``Spread.infer``.
        cu_seqlens: Boundaries ``(0, ..., seq_len)`` of packed documents, host integers.
        validate: Whether ranks compare their arguments at each call in here; see
            ``long_context_attention``.

    Raises:
        TypeError: something of another kind.
        ValueError: nobody says the length, or two say different ones, or the layout is unknown or
            made for another number of ranks.

    Example:
        >>> spread = usp.Spread(mesh, layout="zigzag", seq_len=x.shape[1])   # x on every rank
        >>> x = spread.shard(x)
        >>> for block in self.blocks:
        ...     x = block(x, spread)                 # attention(q, k, v, spread=spread) inside
        >>> return self.head(spread.take(x, [0]))    # the class token
    """

    mesh: SequenceMesh | None
    layout: Layout = "contiguous"
    seq_len: int = cast(int, None)  # a number as soon as there is a Spread
    cu_seqlens: tuple[int, ...] | None = None
    validate: bool | None = None

    def __post_init__(self) -> None:
        check_mesh(self.mesh)
        check_layout(self.layout)
        said: dict[str, int] = {}
        if self.cu_seqlens is not None:
            documents = check_cu_seqlens(self.cu_seqlens)
            object.__setattr__(self, "cu_seqlens", documents)
            said["cu_seqlens[-1]"] = documents[-1]
        if not isinstance(self.layout, str):
            said["the layout"] = self.layout.seq_len
        if self.seq_len is not None:
            said["seq_len"] = integer("seq_len", self.seq_len, least=0)
        if len(set(said.values())) != 1:
            raise ValueError(
                f"a Spread must know the one length of the whole sequence, got {said or 'none'}: "
                "pass seq_len=, or let the ranks tell each other: usp.Spread.infer(local tokens, "
                "mesh)"
            )
        object.__setattr__(self, "seq_len", next(iter(said.values())))
        if isinstance(self.layout, Held):
            _ = self.local_seq_len  # refuses counts of other ranks

    @classmethod
    def infer(
        cls,
        length: int,
        mesh: SequenceMesh | None,
        layout: Layout = "contiguous",
        cu_seqlens: Sequence[int] | Tensor | None = None,
        validate: bool | None = None,
    ) -> Spread:
        """The same where the whole is only known to all ranks together, which are asked once.

        One message of 48 bytes along each axis of the mesh, whatever ``validate`` is; on a GPU it
        is waited for. For tokens cut by no rule take ``usp.Spread(mesh, usp.held(length, mesh))``.

        Args:
            length: Tokens that this rank holds.
            mesh, layout, cu_seqlens, validate: As above.

        Raises:
            ValueError: the ranks hold other shares than the layout gives them, or have other
                layouts or documents; on all of them.
        """

        def alike() -> Facts:
            ends = None if cu_seqlens is None else check_cu_seqlens(cu_seqlens)
            return {"layout": check_layout(layout), "cu_seqlens": ends}

        held = ask_lengths(length, mesh, alike)
        whole = summed_length("x", held, layout, degrees_and_place(mesh)[0])
        return cls(mesh, layout, whole, cast(Any, cu_seqlens), validate)

    @property
    def local_seq_len(self) -> int:
        """Tokens that this rank holds."""
        degrees, _ = degrees_and_place(self.mesh)
        return shares(self.layout, self.seq_len, *degrees)[self.mesh.rank if self.mesh else 0]

    @property
    def options(self) -> dict[str, Any]:
        """As keyword arguments of ``LongContextAttention``, ``MultiheadAttention`` and
        ``replace_attention``, for models whose lengths never change."""
        found = {"mesh": self.mesh, "layout": self.layout, "seq_len": self.seq_len}
        return found if self.cu_seqlens is None else found | {"cu_seqlens": self.cu_seqlens}

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """``usp.positions``: (local tokens,) int64, ascending."""
        return positions(self.seq_len, self.mesh, self.layout, device)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """``usp.shard_sequence``: this rank's tokens of a whole that every rank holds.

        Raises:
            ValueError: ``x`` is not as long as the whole; names both.
        """
        if x.shape[checked_dim(x, dim)] != self.seq_len:
            raise ValueError(
                f"x has {x.shape[dim]} tokens along dim {dim}, the whole sequence {self.seq_len}: "
                "only what every rank holds whole can be cut"
            )
        return shard_sequence(x, self.mesh, dim, self.layout)

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """``usp.unshard_sequence``: the whole on every rank."""
        return unshard_sequence(
            x, self.mesh, dim, self.layout, self.seq_len, validate=self.validate
        )

    def take(self, x: Tensor, rows: Sequence[int] | Tensor, dim: int = 1) -> Tensor:
        """``usp.take``: a few tokens by global position, on every rank."""
        return take(x, self.mesh, rows, dim, self.layout, self.seq_len, validate=self.validate)

    def roll(self, x: Tensor, shift: int, dim: int = 1) -> Tensor:
        """``usp.roll``: all tokens ``shift`` places on."""
        return roll(x, self.mesh, shift, dim, self.layout, self.seq_len, validate=self.validate)

    def mean(self, x: Tensor, dim: int | Sequence[int] = 1, *, keepdim: bool = False) -> Tensor:
        """``usp.mean`` over the tokens of all ranks."""
        return mean(x, self.mesh, dim, keepdim=keepdim, validate=self.validate)

    def var(self, x: Tensor, dim: int | Sequence[int] = 1, **options: Any) -> Tensor:
        """``usp.var``; options: ``correction``, ``keepdim``."""
        return var(x, self.mesh, dim, validate=self.validate, **options)

    def var_mean(
        self, x: Tensor, dim: int | Sequence[int] = 1, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """``usp.var_mean``; options: ``correction``, ``keepdim``."""
        return var_mean(x, self.mesh, dim, validate=self.validate, **options)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``usp.long_context_attention`` of this rank's tokens; its other options as there."""
        return long_context_attention(q, k, v, **self.options, validate=self.validate, **options)

    def replicated(self) -> AbstractContextManager[None]:
        """``usp.rng.replicated``: random numbers equal on all ranks."""
        return rng.replicated(self.mesh)

    def sharded(self) -> AbstractContextManager[None]:
        """``usp.rng.sharded``: random numbers that differ on each rank."""
        return rng.sharded(self.mesh)


def check_spread(
    spread: Any, mesh: SequenceMesh | None, place: str, validate: When, other: object
) -> Spread:
    """``spread=`` of a module's call.

    Args:
        spread: What was given.
        mesh: Of the module, in whose place the spread's is.
        place: Of ``agreement.PLACES``.
        validate: See ``agreement.meets``.
        other: What else says the length or documents; None where nothing does.

    Raises:
        TypeError, ValueError: it is no Spread, or not alone; on a rank of ``mesh`` of as many
            ranks, it is of other degrees than that of another rank. On all ranks of ``mesh``.
    """
    try:
        if not isinstance(spread, Spread):
            raise TypeError(f"spread must be a usp.Spread, got {type(spread).__name__}")
        if other is not None:
            raise ValueError("spread says the length and documents: leave out the others")
    except (TypeError, ValueError) as refusal:
        refuse_together(mesh, place, validate, refusal)
        raise
    meet_in_place_of(mesh, spread.mesh, place, validate)
    return spread
