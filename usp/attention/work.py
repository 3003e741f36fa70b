"""What a call does in chunks of tokens and groups of heads, and the head exchange of a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from torch import Tensor

from usp.attention.hybrid import Call
from usp.attention.ring import Ring
from usp.attention.ulysses import scatter_heads, send_tokens
from usp.distributed.mesh import SequenceMesh, degrees_and_place
from usp.planning.chunks import Chunks, make_chunks
from usp.planning.heads import Cut, Heads, head_groups
from usp.planning.layout import Replicated
from usp.planning.shares import row_pieces


@dataclass(frozen=True, eq=False)
class Group:
    """Heads that are computed together.

    Attributes:
        heads: Of each rank of the mesh row, of those of this call.
        ring: Who computes what with whom, for those of this rank.
    """

    heads: tuple[Heads, ...]
    ring: Ring


@dataclass(frozen=True, eq=False)
class Work:
    """A call in chunks.

    Attributes:
        call: Of the whole.
        chunks: The plan.
        groups: Of heads.
    """

    call: Call
    chunks: Chunks
    groups: tuple[Group, ...]

    @cached_property
    def queries(self) -> list[slice]:
        """This rank's tokens of each chunk."""
        return self._slices(self.chunks.queries)

    @cached_property
    def keys(self) -> list[slice]:
        return self._slices(self.chunks.keys)

    def _slices(self, lengths: Sequence[Sequence[int]]) -> list[slice]:
        mine = [each[self.call.ulysses.rank] for each in lengths]
        return [slice(a, b) for a, b in pairwise(accumulate(mine, initial=0))]

    def query_cut(self, group: Group, chunk: int) -> Cut:
        return Cut.of_query_heads(self.chunks.queries[chunk], group.heads)

    def key_cut(self, group: Group, chunk: int) -> Cut:
        return Cut.of_key_heads(self.chunks.keys[chunk], group.heads)


def make_work(call: Call, mesh: SequenceMesh | None) -> Work:
    """The chunks of a call: no more than a rank has tokens, and groups than it has key heads."""
    request, ring, (degrees, _) = call.request, call.ring, degrees_and_place(mesh)
    assert isinstance(ring, Ring)
    queries, keys = (
        row_pieces(layout, length, *degrees)
        for layout, length in zip(
            request.layouts, (request.query_len, request.key_len), strict=True
        )
    )
    most = max(map(max, (*queries, *keys)))
    count = max(1, min(request.chunks, most))
    if isinstance(request.layouts[1], Replicated):
        keys = (request.key_lengths,)
    chunks = make_chunks(
        ring.plan, request.masks, request.key_len, request.query_lengths, keys, count
    )
    rank = call.ulysses.rank
    first = ring.heads.offset - call.heads[rank].offset  # of this call, among all
    held = max(stop - start for start, stop in (heads.kv_range for heads in call.heads))
    each = [head_groups(heads, max(1, min(request.head_chunks, held))) for heads in call.heads]
    groups = []
    for heads in zip(*each, strict=True):
        mine = heads[rank]
        own = replace(ring.heads, offset=first + mine.offset, count=mine.count)
        groups.append(Group(heads, replace(ring, heads=own)))
    return Work(call, chunks, tuple(groups))


def there(work: Work, tensors: Sequence[Tensor], cuts: Sequence[Cut]) -> list[Tensor]:
    """(B, tokens of a chunk, all heads, X) -> (B, tokens of the row, heads of a group, X)."""
    axis = work.call.ulysses
    if axis.size > 1:
        return scatter_heads(axis, tensors, cuts)
    return [x[:, :, slice(*cut.heads[0])] for x, cut in zip(tensors, cuts, strict=True)]


def back(
    work: Work, tensors: Sequence[Tensor], cuts: Sequence[Cut], totals: Sequence[Tensor]
) -> None:
    """The way back, into the place of these heads.

    Args:
        totals: (B, tokens of a chunk, all heads, X) each, of the dtype of what comes.
    """
    places = [
        [total[:, :, slice(*heads)] for heads in cut.heads]
        for total, cut in zip(totals, cuts, strict=True)
    ]
    if work.call.ulysses.size > 1:
        send_tokens(work.call.ulysses, tensors, cuts, places)
        return
    for x, (place,) in zip(tensors, places, strict=True):
        place.copy_(x)


def add_back(
    work: Work, tensors: Sequence[Tensor], cuts: Sequence[Cut], totals: Sequence[Tensor]
) -> None:
    """The same, added to what is there: several ranks and groups may have held a head."""
    came = [
        [total.new_empty(total[:, :, slice(*heads)].shape) for heads in cut.heads]
        for total, cut in zip(totals, cuts, strict=True)
    ]
    send_tokens(work.call.ulysses, tensors, cuts, came)
    for total, cut, parts in zip(totals, cuts, came, strict=True):
        for heads, part in zip(cut.heads, parts, strict=True):
            total[:, :, slice(*heads)] += part
