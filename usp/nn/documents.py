"""A batch of packed documents, each on as many ranks as it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from usp.attention.functional import long_context_attention
from usp.distributed.agreement import check_on_all_ranks, digest, refuse_together
from usp.distributed.mesh import SequenceMesh, degrees_and_place
from usp.distributed.submeshes import Submeshes
from usp.planning.degrees import Degrees, choose_degrees
from usp.planning.document_cost import DocumentCost
from usp.planning.kinds import integer
from usp.planning.layout import DocumentZigzag, Held, Layout
from usp.planning.masks.bounds import check_cu_seqlens
from usp.planning.shares import local_positions
from usp.sharding.sequence import unshard_sequence
from usp.sharding.whole import checked_dim

_MASK = {"causal", "window_size"}
_SCORES = {"softmax_scale", "softcap", "alibi_slopes", "sinks"}
_OPTIONS = _MASK | _SCORES | {"transport", "backend", "heads", "validate"}


class Part(NamedTuple):
    """Documents that the ranks of one mesh share, packed.

    Attributes:
        mesh: They, or None for this rank alone.
        layout: Which of these tokens is where.
        cu_seqlens: Boundaries of the documents.
        start, stop: This rank's share of them among its tokens.
    """

    mesh: SequenceMesh | None
    layout: Layout
    cu_seqlens: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class DocumentSchedule:
    """Where the documents of a batch are, and attention over them; from ``schedule_documents``.

    Attributes:
        meshes: Of falling size, from ``submeshes``.
        cu_seqlens: Boundaries of the documents in the packed batch.
        degrees: How many ranks share each of them, and by the cost model when each rank is done.
    """

    meshes: Submeshes
    cu_seqlens: tuple[int, ...]
    degrees: Degrees

    @property
    def mesh(self) -> SequenceMesh | None:
        """All ranks."""
        return self.meshes[0]

    @property
    def _rank(self) -> int:
        return self.mesh.rank if self.mesh is not None else 0

    @cached_property
    def _sizes(self) -> list[tuple[int, int]]:
        """(ring, ulysses) of each mesh."""
        return [degrees_and_place(mesh)[0] for mesh in self.meshes]

    def _documents(self, degree: int, rank: int) -> list[int]:
        placed = self.degrees.placed
        return [i for i, at in enumerate(placed) if at == (degree, rank // degree)]

    def _part(self, place: int, rank: int) -> tuple[Layout, tuple[int, ...], Tensor]:
        """Of a rank and one of the sizes: layout, boundaries, positions in the whole batch."""
        ring, ulysses = self._sizes[place]
        documents = self._documents(ring * ulysses, rank)
        ends = [self.cu_seqlens[i : i + 2] for i in documents] or [(0, 0)]
        cuts = (0, *accumulate(stop - start for start, stop in ends))
        layout = DocumentZigzag(cuts) if ring > 1 else "contiguous"
        place_in_mesh = divmod(rank % (ring * ulysses), ulysses)
        own = local_positions(layout, cuts[-1], ring, ulysses, place_in_mesh)
        whole = [torch.arange(start, stop) for start, stop in ends]
        return layout, cuts, torch.cat(whole)[own]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """This rank's documents, by the mesh that shares them, the largest first."""
        found: list[Part] = []
        stop = 0
        for place, mesh in enumerate(self.meshes):
            layout, cuts, own = self._part(place, self._rank)
            start, stop = stop, stop + len(own)
            if cuts[-1] or (mesh is None and not found):  # one without tokens, where none has any
                found.append(Part(mesh, layout, cuts, start, stop))
        return tuple(found)

    def _positions(self, rank: int) -> Tensor:
        return torch.cat([self._part(place, rank)[2] for place in range(len(self.meshes))])

    @cached_property
    def positions(self) -> Tensor:
        """(local tokens,) int64: which tokens of the packed batch this rank holds, in its order."""
        return self._positions(self._rank)

    @cached_property
    def _joined(self) -> tuple[Held, Tensor]:
        """How the ranks' tokens lie behind each other, and where each token of the batch is."""
        each = [self._positions(rank) for rank in range(self.mesh.size if self.mesh else 1)]
        return Held(tuple(map(len, each))), torch.cat(each).argsort()

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens of a packed batch that every rank holds whole.

        The gradient is this rank's part: zero at the tokens of other ranks.

        Args:
            x: (..., all tokens, ...), alike on all ranks: features, ids, labels, positions.
            dim: Of the tokens.

        Returns:
            (..., local tokens, ...), document by document; see ``positions``.

        Raises:
            ValueError: ``x`` has another length; says both.
        """
        dim = checked_dim(x, dim)
        if x.shape[dim] != self.cu_seqlens[-1]:
            raise ValueError(
                f"x has {x.shape[dim]} tokens, the documents have {self.cu_seqlens[-1]}: every "
                "rank gives the whole batch"
            )
        return x.index_select(dim, self.positions.to(x.device))

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """The packed batch on every rank; the adjoint of ``shard``, as in ``unshard_sequence``.

        Args:
            x: (..., local tokens, ...).
            dim: Of the tokens.

        Raises:
            ValueError: a rank holds other tokens than its own; on all of them.
        """
        dim = checked_dim(x, dim)
        held, places = self._joined
        whole = unshard_sequence(x, self.mesh, dim, held)
        return whole.index_select(dim, places.to(x.device))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention inside each document, on the ranks that share it.

        Args:
            q: (B, local tokens, H, D). k: (B, local tokens, G, D). v: (B, local tokens, G, Dv).
            options: causal, window_size, softmax_scale, softcap, alibi_slopes, sinks, transport,
                backend, heads, validate of ``long_context_attention``.

        Returns:
            (B, local tokens, H, Dv). Gradients of ``sinks`` are this rank's part of the sum.

        Raises:
            TypeError: another option.
            ValueError: a rank holds other tokens than its own.
            Both on all ranks that share a document with it. Others see that when they next meet it.
        """
        if wrong := sorted(options.keys() - _OPTIONS):
            refusal = TypeError(
                f"a document schedule takes {sorted(_OPTIONS)}, not {wrong}: positions in it are "
                "not those of the batch"
            )
            refuse_together(
                self.parts[0].mesh, "long_context_attention", options.get("validate"), refusal
            )
            raise refusal
        found = [
            long_context_attention(
                q_part,
                k_part,
                v_part,
                part.mesh,
                layout=part.layout,
                seq_len=part.cu_seqlens[-1],
                cu_seqlens=part.cu_seqlens,
                **options,
            )
            for part, q_part, k_part, v_part in zip(
                self.parts, self._cut(q), self._cut(k), self._cut(v), strict=True
            )
        ]
        return torch.cat(cast("list[Tensor]", found), 1) if found[1:] else cast(Tensor, found[0])

    def _cut(self, x: Tensor) -> Sequence[Tensor]:
        """A tensor of all local tokens by parts; the gradients of a split are joined in one copy.

        A length that is wrong is refused by all who share the part that it makes wrong.
        """
        stops = [min(part.stop, x.shape[1]) for part in self.parts[:-1]] + [x.shape[1]]
        sizes = [stop - start for start, stop in pairwise((0, *stops))]
        return x.split(sizes, 1) if sizes[1:] else (x,)


def schedule_documents(
    cu_seqlens: Sequence[int] | Tensor,
    meshes: Submeshes,
    cost: DocumentCost,
    *,
    most_tokens: int | None = None,
) -> DocumentSchedule:
    """Give each document of a packed batch the ranks that it is worth.

    Long documents go to many ranks and short ones to one, so that by ``cost`` the rank that is
    done last is done soon. All ranks compute the same schedule; they compare it, 48 bytes along
    each axis of the mesh.

    Args:
        cu_seqlens: Boundaries ``(0, ..., total)`` of the documents, host integers, alike on all
            ranks.
        meshes: What ``submeshes(mesh)`` returned, made once: itself, for a list of its meshes does
            not say which ranks share cores.
        cost: Of one layer.
        most_tokens: That a rank has room for; a document then goes to as many ranks as it needs.

    Raises:
        TypeError: ``meshes`` or ``cost`` are something else.
        ValueError: the documents have no room, or ranks were given different ones; on all ranks.

    Example:
        >>> meshes = usp.submeshes(usp.init_mesh(ulysses_degree=1, ring_degree=8))   # once
        >>> schedule = usp.schedule_documents(cu_seqlens, meshes, cost)              # every batch
        >>> x = schedule.shard(x, dim=1)
        >>> x = schedule.attention(q, k, v, causal=True)                             # in each layer
    """
    given = meshes if isinstance(meshes, Sequence) else [meshes]
    among = [each for each in given if isinstance(each, SequenceMesh)]
    # of the whole, whose ranks refuse together, whatever is missing
    mesh = (among[0].inside or among[0]) if among else None

    def check() -> tuple[tuple[int, ...], Degrees]:
        if not isinstance(meshes, Submeshes):
            raise TypeError(
                "meshes must be what usp.submeshes(mesh) returned, which says who shares cores, "
                f"got {type(meshes).__name__}"
            )
        sizes = [degrees_and_place(each)[0] for each in meshes]
        if not isinstance(cost, DocumentCost):
            raise TypeError(f"cost must be a usp.DocumentCost, got {type(cost).__name__}")
        cuts = check_cu_seqlens(cu_seqlens)
        lengths = [stop - start for start, stop in pairwise(cuts)]
        most = None if most_tokens is None else integer("most_tokens", most_tokens, least=1)
        return cuts, choose_degrees(lengths, sizes, cost, most, meshes.shared)

    if mesh is None or mesh.size == 1:
        return DocumentSchedule(meshes, *check())
    found, _ = check_on_all_ranks(
        mesh,
        "usp.schedule_documents",
        check,
        lambda found: {
            "number of documents": len(found[0]) - 1,
            "tokens": found[0][-1],
            "cu_seqlens (a digest)": digest(repr(found[0])),
            "degrees (a digest)": digest(repr(found[1].placed)),
        },
    )
    return DocumentSchedule(meshes, *found)
