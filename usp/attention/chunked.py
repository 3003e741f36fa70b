"""Attention of a chunk of queries after the other, of a group of heads after the other.

What is exchanged, received and summed up is there for one chunk at a time; what later chunks need
again, and the backward, waits (``ops/waiting.py``). The ring's executor runs as ever, over plans of
chunks and with pages in the place of a transport.

Source: FPDT (Ulysses-Offload), arXiv:2408.16978.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from usp.attention import block, levels
from usp.attention.bias import gather_bias_gradient, scatter_bias
from usp.attention.block import last_dim_contiguous
from usp.attention.given import Tensors
from usp.attention.hybrid import Call
from usp.attention.pages import Own, Pages, Turn, turns
from usp.attention.pieces import Kept, add_rows, inputs_of, mask_pages, own_masks, pieces_of
from usp.attention.ring import ring_backward, ring_forward
from usp.attention.work import Group, Work, add_back, back, make_work, there
from usp.distributed.mesh import SequenceMesh
from usp.ops.derivatives import OnceDifferentiable, is_differentiated, without_second_derivative
from usp.ops.precision import as_given
from usp.ops.waiting import InPlace, Reader, Store, store_of
from usp.planning.heads import kv_heads_shared
from usp.planning.problem import state_dtype

# Shape and dtype of q, k and v as they were given.
Like = Sequence[tuple[torch.Size, torch.dtype]]


def chunked_attention(
    tensors: Tensors, call: Call, mesh: SequenceMesh | None
) -> tuple[Tensor, Tensor | None]:
    """``hybrid_attention`` in chunks."""
    work = make_work(call, mesh)
    if not is_differentiated(tensors):
        return chunked_forward(tensors, work, keeps=False)[:2]
    out, lse, _ = cast(Any, _Chunked).apply(*tensors, work)
    return out, lse


def chunked_forward(
    tensors: Tensors, work: Work, keeps: bool
) -> tuple[Tensor, Tensor | None, Kept]:
    """Of each group of heads, chunk after chunk: exchange, pages, exchange.

    Args:
        tensors: As they were given.
        keeps: Whether there will be a backward.

    Returns:
        out: (B, Lq, H, Dv). lse: (B, H, Lq), None unless it was asked for. And for a backward.
    """
    call, q = work.call, tensors.q
    out = q.new_empty((*q.shape[:3], tensors.v.shape[3]))
    lse = None
    if call.request.return_lse:
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=state_dtype(q.dtype))
    bias, large_bias = tensors.attn_bias, False
    if bias is not None and call.bias_cut is not None:
        bias, large_bias = levels.prepared(scatter_bias(call.ulysses, bias, call.bias_cut))
    store = store_of(q.device, call.request.offload)
    kept = Kept([], [], [], [], bias, tensors.alibi_slopes)
    if call.ulysses.size == 1 and isinstance(store, InPlace):
        kept.whole.extend((q, tensors.k, tensors.v, out))
    with as_given(q.device):
        kept.masks.extend(own_masks(tensors.key_padding_mask, work))
        masks = mask_pages(kept.masks, work)
        this = _Forward(tensors, work, store, kept, keeps, large_bias, out, lse)
        for group in work.groups:
            own = this.exchanged(group)
            pages = Pages(
                group.ring, work.chunks, store, store.reader(), masks, own, state_dtype(q.dtype)
            )
            for turn in turns(pages):
                this.turn(turn, group)
    store.finish()
    return out, lse, kept


@dataclass(frozen=True, eq=False)
class _Forward:
    """What the turns of a forward share, as in ``chunked_forward``."""

    tensors: Tensors
    work: Work
    store: Store
    kept: Kept
    keeps: bool
    large_bias: bool
    out: Tensor
    lse: Tensor | None

    def exchanged(self, group: Group) -> Iterator[Own]:
        """Keys and values of each chunk, when they are asked for; they wait, and are kept."""
        work = self.work
        for chunk, here in enumerate(work.keys):
            cut = work.key_cut(group, chunk)
            moving = [last_dim_contiguous(x[:, here]) for x in (self.tensors.k, self.tensors.v)]
            own = there(work, moving, [cut, cut])
            waiting = self.store.put(own)
            if self.keeps and not self.kept.whole:
                self.kept.keys.append(waiting)
            yield own, waiting
            del own

    def turn(self, turn: Turn, group: Group) -> None:
        """A chunk of queries."""
        cut, here = self.work.query_cut(group, turn.number), self.work.queries[turn.number]
        (q,) = there(self.work, [last_dim_contiguous(self.tensors.q[:, here])], [cut])
        dims = self.tensors.k.shape[3], self.tensors.v.shape[3]
        inputs = inputs_of(q, dims, self.kept, turn.number, self.work, group)
        out, lse, level = ring_forward(inputs, turn, self.large_bias)
        moving, places = [out], [self.out[:, here]]
        if self.lse is not None:
            moving.append(_by_token(levels.returned(lse, level)))
            places.append(_by_token(self.lse[:, :, here]))
        back(self.work, moving, [cut] * len(moving), places)
        if self.keeps:
            state = [lse] if level is None else [lse, level]
            self.kept.queries.append(self.store.put(state if self.kept.whole else [*state, q, out]))


def chunked_backward(
    dout: Tensor, dlse: Tensor | None, kept: Kept, work: Work, like: Like, wants_dbias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same way back.

    Returns:
        dq, dk, dv, and the gradient of the bias where it is wanted.
    """
    call, store = work.call, store_of(dout.device, work.call.request.offload)
    dq, dbias = dout.new_empty(like[0][0]), None
    if wants_dbias and kept.bias is not None:
        dbias = kept.bias.new_zeros(kept.bias.shape, dtype=state_dtype(dout.dtype))
    kept = pieces_of(kept, work) if kept.whole else kept
    wide = state_dtype(dout.dtype)
    with as_given(dout.device):
        masks = mask_pages(kept.masks, work)
        this = _Backward(dout, dlse, kept, work, like, dq, dbias)
        totals: list[Tensor] = []
        for number, group in enumerate(work.groups):
            keys, queries = kept.of_group(number, len(work.groups))
            reader = store.reader()
            own = _ahead(reader, keys)
            pages = Pages(group.ring, work.chunks, store, reader, masks, own, wide)
            this.turns(pages, group, _ahead(store.reader(), queries))
            totals = totals or this.new_totals()
            for chunk, found in enumerate(pages.home()):
                this.sum_up(found, chunk, group, totals)
    store.finish()
    if dbias is not None and kept.bias is not None and call.bias_cut is not None:
        dbias = gather_bias_gradient(call.ulysses, dbias, call.bias_cut).to(kept.bias.dtype)
    dk, dv = (x.to(dtype) for x, (_, dtype) in zip(totals, like[1:], strict=True))
    return dq, dk, dv, dbias


@dataclass(frozen=True, eq=False)
class _Backward:
    """What the turns of a backward share, as in ``chunked_backward``."""

    dout: Tensor
    dlse: Tensor | None
    kept: Kept
    work: Work
    like: Like
    dq: Tensor
    dbias: Tensor | None

    def turns(self, pages: Pages, group: Group, queries: Iterator[Own]) -> None:
        """Each chunk of queries; when this returns, nothing of them is held."""
        for turn, (held, _) in zip(turns(pages), queries, strict=True):
            self.turn(turn, group, held)

    def turn(self, turn: Turn, group: Group, held: Sequence[Tensor]) -> None:
        """A chunk of queries, and what was kept of it."""
        cut, here = self.work.query_cut(group, turn.number), self.work.queries[turn.number]
        moving = [last_dim_contiguous(self.dout[:, here])]
        if self.dlse is not None:
            moving.append(_by_token(self.dlse[:, :, here]))
        dout, *rest = there(self.work, moving, [cut] * len(moving))
        lse, *level, q, out = held
        dims = self.like[1][0][3], self.like[2][0][3]
        inputs = inputs_of(q, dims, self.kept, turn.number, self.work, group)
        dlse = _by_token(rest[0]) if rest else None
        saved = block.saved_for_backward(dout, dlse, out, lse, turn.backend)
        grads = ring_backward(inputs, saved, turn, self.dbias is not None, lse.dtype, *level)
        back(self.work, [grads.dq], [cut], [self.dq[:, here]])
        if self.dbias is not None and grads.dbias is not None:
            add_rows(self.dbias, grads.dbias, turn.number, self.work, group)

    def sum_up(
        self, found: Sequence[Tensor], chunk: int, group: Group, totals: Sequence[Tensor]
    ) -> None:
        """dk and dv of a chunk to whom its tokens belong."""
        cut, here = self.work.key_cut(group, chunk), self.work.keys[chunk]
        places = [total[:, here] for total in totals]
        if kv_heads_shared(self.work.call.heads):
            add_back(self.work, found, [cut, cut], places)
        else:
            moving = [x.to(total.dtype) for x, total in zip(found, totals, strict=True)]
            back(self.work, moving, [cut, cut], places)

    def new_totals(self) -> list[Tensor]:
        """dk and dv; in the dtype of the state where ranks share key heads and sums are taken."""
        wide = state_dtype(self.dout.dtype)
        if not kv_heads_shared(self.work.call.heads):
            return [self.dout.new_empty(shape, dtype=dtype) for shape, dtype in self.like[1:]]
        return [self.dout.new_zeros(shape, dtype=wide) for shape, _ in self.like[1:]]


def _by_token(lse: Tensor) -> Tensor:
    """(B, H, L) -> (B, L, H, 1) as the exchange moves it, and back; a view."""
    return lse.transpose(1, 2)[..., None] if lse.dim() == 3 else lse[..., 0].transpose(1, 2)


def _ahead(reader: Reader, waiting: Sequence[list[Tensor]]) -> Iterator[Own]:
    """What waits, and by what it did; the next is on its way while one is computed with."""
    ahead = reader.fetch(waiting[0])
    for i, each in enumerate(waiting):
        found = ahead()
        if i + 1 < len(waiting):
            ahead = reader.fetch(waiting[i + 1])
        yield found, each


class _Chunked(OnceDifferentiable):
    """Autograd over ``chunked_forward`` and its twin."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        slopes: Tensor | None,
        work: Work,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        tensors = Tensors(q, k, v, mask, bias, slopes)
        out, lse, kept = chunked_forward(tensors, work, keeps=True)
        anchor = out.new_empty(0)
        lists = kept.whole, kept.masks, *kept.queries, *kept.keys
        ctx.save_for_backward(anchor, kept.bias, kept.slopes, *chain(*lists))
        ctx.work, ctx.lengths = work, [len(each) for each in lists]
        ctx.like = [(x.shape, x.dtype) for x in (q, k, v)]
        return out, lse, anchor

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor, dlse: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        anchor, bias, slopes, *rest = ctx.saved_tensors
        work, each = ctx.work, iter(rest)
        work.call.meet()
        lists = [[next(each) for _ in range(length)] for length in ctx.lengths]
        whole, masks, *others = lists
        number = len(work.groups) * len(work.queries)
        kept = Kept(whole, others[number:], others[:number], masks, bias, slopes)
        with torch.no_grad():
            found = chunked_backward(dout, dlse, kept, work, ctx.like, ctx.needs_input_grad[4])
        dq, dk, dv, dbias = without_second_derivative(found, (dout, dlse, anchor))
        return dq, dk, dv, None, dbias, None, None
