"""What waits for a backward in chunks, and what a chunk of queries is computed with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from usp.attention.block import last_dim_contiguous
from usp.attention.given import Tensors
from usp.attention.work import Group, Work, there
from usp.distributed.double_ring import transport_along
from usp.distributed.transport import Parts
from usp.planning.heads import Cut


class Kept(NamedTuple):
    """What a backward needs, as it waits.

    Attributes:
        whole: q, k, v and out where nothing was exchanged, and nothing waits elsewhere.
        keys: Else of each group and chunk k and v. queries: Of each lse, the level if there is one,
            and else q and out.
        masks: Of each chunk the own keys' padding mask. bias, slopes: Of this rank's heads.
    """

    whole: list[Tensor]
    keys: list[list[Tensor]]
    queries: list[list[Tensor]]
    masks: list[Tensor]
    bias: Tensor | None
    slopes: Tensor | None

    def of_group(self, number: int, groups: int) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Keys and queries of one of so many groups."""
        of = ((each, len(each) // groups) for each in (self.keys, self.queries))
        keys, queries = (each[number * count :][:count] for each, count in of)
        return keys, queries


def pieces_of(kept: Kept, work: Work) -> Kept:
    """What was kept whole as pieces of it."""
    q, k, v, out = kept.whole
    keys, queries, state = list[list[Tensor]](), list[list[Tensor]](), iter(kept.queries)
    for group in work.groups:
        for chunk, here in enumerate(work.keys):
            heads = slice(*work.key_cut(group, chunk).heads[0])
            keys.append([last_dim_contiguous(x[:, here, heads]) for x in (k, v)])
        for chunk, here in enumerate(work.queries):
            heads = slice(*work.query_cut(group, chunk).heads[0])
            moved = (last_dim_contiguous(x[:, here, heads]) for x in (q, out))
            queries.append([*next(state), *moved])
    return kept._replace(keys=keys, queries=queries)


def own_masks(mask: Tensor | None, work: Work) -> Iterator[Tensor]:
    """Of each chunk the padding mask of the keys of this row."""
    degree = work.call.ulysses.size
    for chunk, here in enumerate(work.keys if mask is not None else ()):
        assert mask is not None
        each = mask[:, here, None, None].expand(-1, -1, degree, -1)
        yield there(work, [each], [Cut.one_for_each(work.chunks.keys[chunk])])[0][:, :, 0, 0]


def mask_pages(own: Sequence[Tensor], work: Work) -> list[Parts]:
    """The masks of all pages: a byte a key, which every group of heads needs."""
    ring, found = work.groups[0].ring, []
    loads = ring.plan.steps[0].loads
    for mask, route in zip(own, work.chunks.routes if own else (), strict=True):
        parts = [[load.samples.of(mask)] for load in loads]
        for held in transport_along(ring.axis, route, ring.levels).blocks(parts):
            found.append([[x.clone() for x in part] for part in held])
    return found


def inputs_of(
    q: Tensor, dims: tuple[int, int], kept: Kept, chunk: int, work: Work, group: Group
) -> Tensors:
    """What a chunk of queries is computed with; its keys come all as pages.

    Args:
        q: (B, queries, heads of the group, D).
        dims: D and Dv.
    """
    mine = group.heads[work.call.ulysses.rank]
    start, stop = mine.kv_range
    k, v = (q.new_empty((q.shape[0], 0, stop - start, dim)) for dim in dims)
    mask = kept.masks[0][:, :0] if kept.masks else None
    slopes, bias = kept.slopes, kept.bias
    if slopes is not None:
        slopes = slopes[:, mine.offset : mine.offset + mine.count]
    if bias is not None:
        bias = bias[:, _bias_heads(work, group)]
        rows = _bias_rows(chunk, work, bias.device)
        bias = bias if rows is None else bias.index_select(2, rows)
    return Tensors(q, k, v, mask, bias, slopes)


def _bias_heads(work: Work, group: Group) -> slice:
    """Those of the group among this rank's; all where it has none."""
    rank, cut = work.call.ulysses.rank, work.call.bias_cut
    assert cut is not None
    if not cut.has_heads:
        return slice(None)
    start = group.heads[rank].offset - work.call.heads[rank].offset
    return slice(start, start + group.heads[rank].count)


def _bias_rows(chunk: int, work: Work, device: torch.device) -> Tensor | None:
    """Those of the chunk; None where all queries share one."""
    assert work.call.bias_cut is not None
    return work.chunks.rows[chunk].on(device) if work.call.bias_cut.has_rows else None


def add_rows(total: Tensor, found: Tensor, chunk: int, work: Work, group: Group) -> None:
    """Add a chunk's gradient of the bias."""
    total, rows = total[:, _bias_heads(work, group)], _bias_rows(chunk, work, total.device)
    if rows is None:
        total += found
    else:
        total.index_add_(2, rows, found)
