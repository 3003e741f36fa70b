"""The oracle: dense attention in fp64, and its dropout. It imports nothing that it judges.
 Shape letters: B batch, Sq / Sk whole query / key
sequences, H query heads, G key/value heads, D head dim of q and k, Dv head dim of v.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Said everywhere, because a user may have set another default device.
_HOST = torch.device("cpu")


def visible_keys(
    query_len: int,
    key_len: int,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    cu_seqlens: Sequence[int] | Tensor | None = None,
    prefix_len: int | None = None,
    query_offset: int = 0,
) -> Tensor:
    """Who sees whom: (Sq, Sk) bool, True where query i attends to key j. Positions are global."""
    i = torch.arange(query_len, device=_HOST)[:, None] + query_offset
    j = torch.arange(key_len, device=_HOST)[None, :]
    visible = torch.ones(query_len, key_len, dtype=torch.bool, device=_HOST)
    if causal:
        visible &= (j <= i) | (j < (prefix_len or 0))
    left, right = window_size
    if left is not None:
        visible &= j >= i - left
    if right is not None:
        visible &= j <= i + right
    if cu_seqlens is not None:
        ends = torch.as_tensor(cu_seqlens, device=_HOST)[1:].contiguous()
        visible &= torch.bucketize(i, ends, right=True) == torch.bucketize(j, ends, right=True)
    return visible


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    cu_seqlens: Sequence[int] | Tensor | None = None,
    prefix_len: int | None = None,
    query_offset: int | Tensor = 0,
    attn_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over whole sequences, in fp64, differentiable, with the full score matrix.

    Args:
        q: (B, Sq, H, D), any float dtype.
        k: (B, Sk, G, D), H a multiple of G.
        v: (B, Sk, G, Dv).
        causal, window_size, cu_seqlens, prefix_len: see ``visible_keys``.
        query_offset: Position of the first query among the keys, for all or (B,).
        attn_mask: (B|1, H|1, Sq|1, Sk) bool, True where a query may see a key.
        softmax_scale: Dimensionless, default ``D ** -0.5``.
        key_padding_mask: (B, Sk) bool, True = ignore.
        attn_bias: (B|1, H|1, Sq|1, Sk), added to the scores; the lowest number of bf16 and what
            lies below it hide. Exact for any offset that a row's values share.
        softcap: Scores become ``softcap * tanh(score / softcap)`` before the bias.
        alibi_slopes: (H,) or (B, H); ``slope * |i - j|`` is taken off the scores.
        sinks: (H,) logits of one more key for each head, of value 0.
        dropout_keep: (B, H, Sq, Sk) multiplier of the probabilities; lse does not see it.

    Returns:
        out (B, Sq, H, Dv) and lse (B, H, Sq), fp64. A row that sees nothing has out 0, lse -inf
        and zero gradients.
    """
    q, k, v = q.double(), k.double(), v.double()
    group_size = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group_size, 2), v.repeat_interleave(group_size, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    scores = scores * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    sq, sk = scores.shape[2:]
    if alibi_slopes is not None:
        first = torch.as_tensor(query_offset, device=q.device).view(-1, 1, 1, 1)
        i, j = torch.arange(sq, device=q.device), torch.arange(sk, device=q.device)
        distance = (first + i[:, None] - j[None, :]).abs()
        scores = scores - alibi_slopes.double().expand(q.shape[0], -1)[..., None, None] * distance
    hidden = ~torch.stack(
        [
            visible_keys(
                sq,
                sk,
                causal=causal,
                window_size=window_size,
                cu_seqlens=cu_seqlens,
                prefix_len=prefix_len,
                query_offset=first,
            )
            for first in torch.as_tensor(query_offset, device=_HOST).flatten().tolist() or [0]
        ]
    )[:, None].to(q.device)
    if attn_mask is not None:
        hidden = hidden | ~attn_mask
    if key_padding_mask is not None:
        hidden = hidden | key_padding_mask[:, None, None, :]
    level = scores.new_zeros(())  # even fp64 has no digits for scores beside 1e30
    if attn_bias is not None:
        hidden = hidden | (attn_bias.double() <= torch.finfo(torch.bfloat16).min)
        level = _largest(attn_bias.double().expand_as(scores).masked_fill(hidden, float("-inf")))
        level = level if sinks is None else level.clamp(min=0.0)  # which have no bias
        scores = scores + (attn_bias.double() - level[..., None])
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        sink = sinks.double()[:, None, None].expand(*scores.shape[:3], 1) - level[..., None]
        scores, hidden = torch.cat((scores, sink), -1), hidden.expand_as(scores)
        hidden = torch.cat((hidden, torch.zeros_like(sink, dtype=torch.bool)), -1)
        v = torch.cat((v, torch.zeros_like(v[:, :1])), 1)
        if dropout_keep is not None:
            dropout_keep = torch.cat((dropout_keep, torch.ones_like(dropout_keep[..., :1])), -1)
    seen, largest = (~hidden).expand_as(scores).any(-1), _largest(scores)
    weights = torch.exp(scores - largest[..., None])
    total = torch.where(seen, weights.sum(-1), 1.0)
    lse = torch.where(seen, largest + torch.log(total) + level, float("-inf"))
    probabilities = weights / total[..., None]
    if dropout_keep is not None:
        probabilities = probabilities * dropout_keep.to(q.device).double()
    return torch.einsum("bhij,bjhd->bihd", probabilities, v), lse


def _largest(scores: Tensor) -> Tensor:
    """Of each row, 0 where there is none."""
    if not scores.shape[-1]:
        return scores.new_zeros(scores.shape[:-1])
    largest = scores.detach().amax(-1)
    return torch.where(largest > float("-inf"), largest, 0.0)


_WORD = 0xFFFFFFFF


def philox(counter: Sequence[Tensor | int], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four 32-bit counter words and a 64-bit key to four random 32-bit words.

    Args:
        counter: Four broadcastable int64 tensors (or ints) with values below 2^32.
        key: Two ints below 2^32.

    Returns:
        Four int64 tensors with values below 2^32.

    Source:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(
        *(torch.as_tensor(word, device=_HOST) for word in counter)
    )
    key0, key1 = key
    for _ in range(10):
        # int64 products wrap, which leaves their 64 bits as they should be
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        high0, high1 = (product0 >> 32) & _WORD, (product1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, product1 & _WORD, high0 ^ c3 ^ key1, product0 & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def dropout_multiplier(
    dropout_p: float,
    seed: int,
    batch: int,
    num_heads: int,
    query_len: int,
    key_len: int,
    query_offset: int | Tensor = 0,
) -> Tensor:
    """What dropout multiplies each probability with: (B, H, Sq, Sk) fp64, 0 or ``1 / (1 - p)``."""
    sequence_head = torch.arange(batch * num_heads, device=_HOST).view(batch, num_heads, 1, 1)
    first = torch.as_tensor(query_offset, device=_HOST).view(-1, 1, 1, 1)
    i = (first + torch.arange(query_len, device=_HOST).view(-1, 1)) & _WORD
    j = torch.arange(key_len, device=_HOST)
    words = philox((j >> 2, i, sequence_head, 0), (seed & _WORD, (seed >> 32) & _WORD))
    word = torch.stack(words, -1).gather(
        -1, (j & 3).expand(batch, num_heads, query_len, key_len)[..., None]
    )[..., 0]
    return (word >= int(dropout_p * 2**32)).double() / (1.0 - dropout_p)
