"""Plain torch, for any device and dtype: the arithmetic written out, in chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from usp.ops import philox
from usp.planning.problem import Block, Gradients, Saved, Traits, state_dtype

NAME = "reference"
CARRIES_STATE = False
OVERWRITES = False
_SCORES_AT_ONCE = 1 << 24


def unavailable() -> str | None:
    return None


def reasons_against(traits: Traits) -> tuple[str, ...]:
    return ()


def attention_partials(block: Block) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Dense softmax of chunks of rows against the keys that they see."""
    k, v = _expanded(block)
    for rows, keys in _chunks(block):
        scores, _ = _scores(block, k, rows, keys)
        weights, lse = _softmax(scores)
        if block.scoring.dropout_p:
            weights = weights * _kept(block, rows, keys)
        yield rows, torch.einsum("bhij,bjhd->bihd", weights, v[:, keys]), lse


def attention_backward(block: Block, saved: Saved, grads: Gradients) -> None:
    """The gradients of those rows, with the weights of the final softmax."""
    k, v = _expanded(block)
    scoring = block.scoring
    to_kv = torch.tensor(block.heads.kv_index, device=k.device, dtype=torch.int64)
    for rows, keys in _chunks(block):
        scores, capped = _scores(block, k, rows, keys)
        weights = _weights(scores, saved.lse[:, :, rows])
        dout = saved.dout[:, rows].to(weights.dtype)
        dweights = torch.einsum("bihd,bjhd->bhij", dout, v[:, keys])
        dropped = weights
        if scoring.dropout_p:
            kept = _kept(block, rows, keys)
            dropped, dweights = weights * kept, dweights * kept
        dv = torch.einsum("bhij,bihd->bjhd", dropped, dout)
        dscores = weights * (dweights - saved.delta[:, :, rows, None])
        if grads.dbias is not None:
            dbias = grads.dbias[..., keys]
            dbias = dbias[:, :, rows] if dbias.shape[2] != 1 else dbias
            dbias += dscores.sum_to_size(dbias.shape)
        if scoring.softcap:
            dscores = dscores * (1 - (capped / scoring.softcap).square())
        dscores = dscores * scoring.softmax_scale
        grads.dq[:, rows] += torch.einsum("bhij,bjhd->bihd", dscores, k[:, keys])
        dk = torch.einsum("bhij,bihd->bjhd", dscores, block.q[:, rows].to(k.dtype))
        grads.dk[:, keys].index_add_(2, to_kv, dk)
        grads.dv[:, keys].index_add_(2, to_kv, dv)


def _expanded(block: Block) -> tuple[Tensor, Tensor]:
    """K and V in the dtype of the state, one head for each query head."""
    dtype = state_dtype(block.q.dtype)
    index = torch.tensor(block.heads.kv_index, device=block.q.device, dtype=torch.int64)
    return block.k.to(dtype).index_select(2, index), block.v.to(dtype).index_select(2, index)


def _chunks(block: Block) -> Iterator[tuple[slice, slice]]:
    """Runs of rows with the keys that they see, small enough to hold all their scores."""
    batch, num_rows, num_heads = block.q.shape[:3]
    num_keys, span = block.k.shape[1], block.visit.span
    step = max(1, _SCORES_AT_ONCE // max(1, batch * num_heads * num_keys))
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        keys = slice(0, num_keys)
        if span is not None:
            keys = slice(int(span.first[start]), int(span.stop[stop - 1]))
        if keys.start < keys.stop:
            yield slice(start, stop), keys


def _scores(block: Block, k: Tensor, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
    """(B, H, rows, keys) scores, -inf where hidden; and those before bias, capped."""
    scoring = block.scoring
    q = block.q[:, rows].to(k.dtype)
    capped = torch.einsum("bihd,bjhd->bhij", q, k[:, keys]) * scoring.softmax_scale
    if scoring.softcap:
        capped = scoring.softcap * torch.tanh(capped / scoring.softcap)
    scores = capped
    if block.bias is not None:
        bias = block.bias[..., keys]
        scores = scores + (bias[:, :, rows] if bias.shape[2] != 1 else bias)
    if block.alibi_slopes is not None:
        assert block.q_pos is not None and block.k_pos is not None
        distance = (block.q_pos[rows, None] - block.k_pos[None, keys]).abs()
        scores = scores - block.alibi_slopes[:, :, None, None] * distance
    if block.span is not None:
        first, stop = (end[rows, None] for end in block.span)
        j = torch.arange(keys.start, keys.stop, device=k.device)
        scores = scores.masked_fill((j < first) | (j >= stop), -torch.inf)
    return scores, capped


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights over the last dim, and lse; 0 and -inf, not NaN, where every score is -inf.

    The weights sum up to 1 also where an lse is too large to have digits for their number.
    """
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    lse = (top + total.log()).squeeze(-1)
    return weights / torch.where(total > 0, total, 1), lse


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(score - lse), 0 for rows that see nothing."""
    safe = torch.where(lse == -torch.inf, 0, lse)
    return (scores - safe[..., None]).exp()


def _kept(block: Block, rows: slice, keys: slice) -> Tensor:
    """(B, H, rows, keys) dropout factors: 0, or 1 / (1 - dropout_p)."""
    assert block.q_pos is not None and block.k_pos is not None
    heads, scoring = block.heads, block.scoring
    batch = torch.arange(block.q.shape[0], device=block.q.device)[:, None] * heads.total
    streams = batch + (heads.offset + torch.arange(heads.count, device=block.q.device))
    factors = philox.dropout_factors(
        scoring.dropout_p,
        streams[:, :, None, None],
        block.q_pos[rows].long()[:, None],
        block.k_pos[keys].long(),
        scoring.dropout_seed,
    )
    return factors.to(state_dtype(block.q.dtype))
