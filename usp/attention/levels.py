"""Biases that hide, and rows whose scores share a large offset.

A row's state is its output and its LSE. Where all scores of a row lie near -1e9, fp32 leaves of the
LSE that -1e9 and nothing of how many keys there were: what merges two blocks of such a row, or
takes its weights from its LSE, is wrong by any factor. A softmax does not change when all scores
of its row do by the same amount. So such rows are computed relative to a level, about the largest
bias that they have seen: ``bias - level`` is what kernels are given, and ``lse - level`` what they
carry. Rows below ``LARGE`` keep level 0, and calls without large values their bias as it is.

Shape letters: b, h, q where a dim may be 1, because a bias is broadcast along it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from usp.planning.problem import Block
from usp.planning.visit import Span, Visit

# From here on fp32 rounds an LSE by more than 3e-5, and the weights of its row with it.
LARGE = 1024.0
# Rows that share a bias share a level as long as theirs is this near.
_NEAR = LARGE / 2
# Values looked at in one go: what a CPU's cache holds, or what fills a GPU.
_AT_ONCE_ON_CPU, _AT_ONCE_ON_GPU = 1 << 18, 1 << 26


def lowest(dtype: torch.dtype) -> float:
    """From which value down a bias hides its key, as -inf does.

    The lowest number of its dtype, with which masks are filled. That of bf16 lies above that of
    fp32 and counts in both, so that casting such a mask changes nothing.
    """
    return max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)


def hidden(bias: Tensor) -> Tensor:
    """The bias with -inf where it hides, differentiable; a new tensor."""
    return F.threshold(bias, lowest(bias.dtype), -torch.inf)


def prepared(bias: Tensor) -> tuple[Tensor, bool]:
    """The bias with -inf where it hides, and whether other values are large.

    Looks at the values once, which on a GPU waits for them. While a CUDA graph is captured it
    cannot: then all that needs no look is done, levels where each row has a bias of its own.

    Args:
        bias: (b, h, q, Sk), any strides.
    """
    stored = bias[tuple(slice(0, None if stride else 1) for stride in bias.stride())]
    bound = lowest(bias.dtype)
    if bias.is_cuda and torch.cuda.is_current_stream_capturing():
        hides, large = True, bias.shape[2] != 1
    else:
        low, high = _ends(stored)
        if low == -torch.inf:
            low, high = _ends(stored, -torch.inf)
        hides = not low > bound
        if hides:
            low, high = _ends(stored, bound)
        large = not -LARGE < low <= high < LARGE
    return (hidden(stored).expand(bias.shape) if hides else bias), large


def _ends(bias: Tensor, above: float | None = None) -> tuple[float, float]:
    """The least and the largest of 0 and the values above a bound; NaN where one is NaN."""
    if not bias.numel():
        return 0.0, 0.0
    if above is None:
        ends = torch.stack(bias.aminmax())
    else:
        rows = _rows_at_once(bias)
        parts = (F.threshold(part, above, 0.0) for part in bias.split(rows, 2))
        found = torch.stack([torch.stack(part.aminmax()) for part in parts])
        ends = torch.stack((found[:, 0].amin(), found[:, 1].amax()))
    low, high = ends.tolist()
    return low, high


def _rows_at_once(bias: Tensor) -> int:
    values = _AT_ONCE_ON_CPU if bias.device.type == "cpu" else _AT_ONCE_ON_GPU
    return max(1, values // max(1, bias[:, :, :1].numel()))


def enter(block: Block, level: Tensor, lse: Tensor) -> list[Block]:
    """Raise the levels of all rows for a block, before its keys come into their state.

    Args:
        block: Its bias is not relative yet.
        level: (b, h, Lq), updated in place.
        lse: (B, H, Lq) relative to ``level``, updated in place: relative to the new one.

    Returns:
        The block relative to the new levels: see ``relative``.
    """
    assert block.bias is not None
    raised = _where_large(torch.maximum(level, _largest_seen(block.bias, block.visit)))
    if block.bias.shape[2] == 1:
        raised = _in_runs(raised)
    lse += torch.where(level == -torch.inf, 0.0, level - raised)
    level.copy_(raised)
    return relative(block, level)


def of_rows(bias: Tensor, unbiased: bool) -> Tensor:
    """(b, h, q, 1) levels of whole rows, not differentiable.

    Args:
        bias: (b, h, q, Sk), -inf wherever a row does not see a key.
        unbiased: Whether each row sees other keys too, which have no bias.
    """
    if not bias.shape[-1]:
        return bias.new_zeros((*bias.shape[:-1], 1))
    level = bias.detach().amax(-1, keepdim=True).clamp(min=0.0 if unbiased else -torch.inf)
    return _or_zero(_where_large(level))


def relative(block: Block, level: Tensor) -> list[Block]:
    """The block with a bias relative to the levels of its rows.

    Args:
        block: Its bias is not relative yet.
        level: (b, h, Lq).

    Returns:
        It as one, or, where its bias is the same for all rows and their levels differ, one for
        each run of rows of the same level, which other rows see nothing of.
    """
    bias = block.bias
    assert bias is not None
    level = _or_zero(level)
    if bias.shape[2] != 1:
        return [block._replace(bias=bias - level[..., None])]
    starts = (level[:, :, 1:] != level[:, :, :-1]).flatten(0, 1).any(0).nonzero().flatten() + 1
    ends = [0, *starts.tolist(), level.shape[2]]
    blocks = []
    for start, stop in pairwise(ends):
        visit = _of_rows(block.visit, start, stop)
        if visit.span is None or not visit.span.is_empty:
            blocks.append(block._replace(visit=visit, bias=bias - level[:, :, start, None, None]))
    return blocks


def returned(lse: Tensor, level: Tensor | None) -> Tensor:
    """The LSE itself of one that is relative to a level."""
    return lse if level is None else lse + _or_zero(level)


def _where_large(level: Tensor) -> Tensor:
    """0 where it is not; so too where a NaN, which a row need not see, leaves it open."""
    return torch.where(level.abs() >= LARGE, level, 0.0)


def _or_zero(level: Tensor) -> Tensor:
    """0 where a row has seen nothing."""
    return torch.where(level == -torch.inf, 0.0, level)


def _largest_seen(bias: Tensor, visit: Visit) -> Tensor:
    """(b, h, Lq | 1) largest bias among the keys that a row sees, -inf for none.

    In operations that run in vectors: a masked fill takes ten times as long.
    """
    if visit.span is None:
        return bias.amax(-1)
    first, stop = (end[:, None] for end in visit.span.on(bias.device))
    largest = bias.new_full((*bias.shape[:2], visit.num_queries), -torch.inf)
    rows = _rows_at_once(bias)
    for start in range(0, visit.num_queries, rows):
        end = min(start + rows, visit.num_queries)
        keys = slice(int(visit.span.first[start]), int(visit.span.stop[end - 1]))
        if keys.start >= keys.stop:
            continue
        part = bias[..., keys] if bias.shape[2] == 1 else bias[:, :, start:end, keys]
        j = torch.arange(keys.start, keys.stop, device=bias.device)
        seen = (j >= first[start:end]) & (j < stop[start:end])
        bound = torch.where(seen, torch.inf, -torch.inf).to(bias.dtype)
        largest[:, :, start:end] = torch.minimum(part, bound).amax(-1)
    return largest


def _in_runs(level: Tensor) -> Tensor:
    """(b, h, Lq) levels, each that of the first of a run of rows that are near to it."""
    level = level.clone()
    start, rows = 0, level.shape[2]
    while start < rows:
        first = level[:, :, start, None].clone()
        away = (level[:, :, start:] - first).abs() > _NEAR
        far = away.flatten(0, 1).any(0).nonzero()
        stop = start + int(far[0]) if len(far) else rows
        level[:, :, start:stop] = first
        start = stop
    return level


def _of_rows(visit: Visit, start: int, stop: int) -> Visit:
    """The visit of these rows; the others see nothing."""
    if (start, stop) == (0, visit.num_queries):
        return visit
    if visit.span is None:
        first = torch.zeros(visit.num_queries, dtype=torch.int32)
        last = torch.full_like(first, visit.num_keys)
    else:
        first, last = visit.span.first.clone(), visit.span.stop.clone()
    last[:start] = first[:start] = first[start]
    first[stop:] = last[stop:] = last[stop - 1]
    span = Span(first, last)
    return Visit(visit.num_queries, visit.num_keys, span)
