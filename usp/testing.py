"""What the tests and the demo judge by: a dense fp64 oracle, its dropout, and a byte counter.

Nothing here imports the code that it judges. Shape letters: B batch, Sq / Sk whole query / key
sequences, H query heads, G key/value heads, D head dim of q and k, Dv head dim of v.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["WireBytes", "dense_attention", "dropout_multiplier", "philox", "visible_keys"]


def visible_keys(
    query_len: int,
    key_len: int,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    cu_seqlens: Sequence[int] | Tensor | None = None,
    prefix_len: int | None = None,
) -> Tensor:
    """Who sees whom: (Sq, Sk) bool, True where query i attends to key j. Positions are global."""
    i = torch.arange(query_len)[:, None]
    j = torch.arange(key_len)[None, :]
    visible = torch.ones(query_len, key_len, dtype=torch.bool)
    if causal:
        visible &= (j <= i) | (j < (prefix_len or 0))
    left, right = window_size
    if left is not None:
        visible &= j >= i - left
    if right is not None:
        visible &= j <= i + right
    if cu_seqlens is not None:
        ends = torch.as_tensor(cu_seqlens)[1:].contiguous()
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
    softmax_scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over whole sequences, in fp64, differentiable, with the full score matrix.

    Args:
        q: (B, Sq, H, D), any float dtype.
        k: (B, Sk, G, D), H a multiple of G.
        v: (B, Sk, G, Dv).
        causal, window_size, cu_seqlens, prefix_len: see :func:`visible_keys`.
        softmax_scale: Dimensionless, default ``D ** -0.5``.
        key_padding_mask: (B, Sk) bool, True = ignore.
        attn_bias: (B|1, H|1, Sq|1, Sk), added to the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)`` before the bias.
        alibi_slopes: (H,) or (B, H); ``slope * |i - j|`` is taken off the scores.
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
    if attn_bias is not None:
        scores = scores + attn_bias.double()
    sq, sk = scores.shape[2:]
    if alibi_slopes is not None:
        distance = (torch.arange(sq)[:, None] - torch.arange(sk)[None, :]).abs()
        scores = scores - alibi_slopes.double().expand(q.shape[0], -1)[..., None, None] * distance
    hidden = ~visible_keys(
        sq, sk, causal=causal, window_size=window_size, cu_seqlens=cu_seqlens, prefix_len=prefix_len
    )
    if key_padding_mask is not None:
        hidden = hidden | key_padding_mask[:, None, None, :]
    scores = scores.masked_fill(hidden, float("-inf"))
    largest = scores.detach().amax(-1) if sk else scores.new_full(scores.shape[:3], float("-inf"))
    seen = largest > float("-inf")
    largest = torch.where(seen, largest, 0.0)
    weights = torch.exp(scores - largest[..., None])
    total = torch.where(seen, weights.sum(-1), 1.0)
    lse = torch.where(seen, largest + torch.log(total), float("-inf"))
    probabilities = weights / total[..., None]
    if dropout_keep is not None:
        probabilities = probabilities * dropout_keep.double()
    return torch.einsum("bhij,bjhd->bihd", probabilities, v), lse


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
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(word) for word in counter))
    key0, key1 = key
    for _ in range(10):
        # int64 products wrap, which leaves their 64 bits as they should be
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        high0, high1 = (product0 >> 32) & _WORD, (product1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, product1 & _WORD, high0 ^ c3 ^ key1, product0 & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def dropout_multiplier(
    dropout_p: float, seed: int, batch: int, num_heads: int, query_len: int, key_len: int
) -> Tensor:
    """What dropout multiplies each probability with: (B, H, Sq, Sk) fp64, 0 or ``1 / (1 - p)``."""
    sequence_head = torch.arange(batch * num_heads).view(batch, num_heads, 1, 1)
    i = torch.arange(query_len).view(-1, 1)
    j = torch.arange(key_len)
    words = philox((j >> 2, i, sequence_head, 0), (seed & _WORD, (seed >> 32) & _WORD))
    word = torch.stack(words, -1).gather(
        -1, (j & 3).expand(batch, num_heads, query_len, key_len)[..., None]
    )[..., 0]
    return (word >= int(dropout_p * 2**32)).double() / (1.0 - dropout_p)


class WireBytes(TorchDispatchMode):
    """Counts the bytes that this rank sends to other ranks through ``torch.distributed``.

    What a rank keeps for itself (its own piece of an all-to-all) does not count. A collective
    counts as its direct algorithm: an all-gather sends a rank's piece to each other rank, a
    reduce-scatter sends each other rank its piece, an all-reduce is one after the other. An
    operation this class does not know raises, so that nothing crosses uncounted.

    Attributes:
        sent: Bytes sent so far.
        calls: How often each ``c10d`` operation was called.

    Example:
        >>> with WireBytes() as wire:
        ...     out = attention(q, k, v)
        >>> wire.sent
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            self.calls[name] += 1
            if name not in _SILENT:
                self.sent += _SENT[name](*args)
        elif namespace == "_c10d_functional" and name != "wait_tensor":
            raise NotImplementedError(f"WireBytes cannot count {func}: it counts c10d:: operations")
        return func(*args, **(kwargs or {}))


def _size(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_size(tensor) for tensor in tensors)


def _group(boxed: Any) -> Any:
    return torch.distributed.ProcessGroup.unbox(boxed)


def _send(tensors: Any, group: Any, destination: int, *_: Any) -> int:
    return _size(tensors) if destination != _group(group).rank() else 0


def _all_to_all_single(
    _output: Tensor,
    source: Tensor,
    group: Any,
    _into: Sequence[int],
    splits: Sequence[int],
    *_: Any,
) -> int:
    group = _group(group)
    rows = source.shape[0] if source.dim() else 1
    own = splits[group.rank()] if splits else rows // group.size()
    return _size(source) // max(rows, 1) * (rows - own)


def _all_to_all(_outputs: Any, sources: Sequence[Tensor], group: Any, *_: Any) -> int:
    return _size(sources) - _size(sources[_group(group).rank()])


def _all_gather(_outputs: Any, sources: Any, group: Any, *_: Any) -> int:
    return _size(sources) * (_group(group).size() - 1)


def _reduce_scatter(_outputs: Any, sources: Any, group: Any, *_: Any) -> int:
    group = _group(group)
    if isinstance(sources, Tensor):
        return _size(sources) // group.size() * (group.size() - 1)
    return sum(_size(pieces) - _size(pieces[group.rank()]) for pieces in sources)


def _reduce_scatter_tensors(_outputs: Any, sources: Sequence[Tensor], group: Any, *_: Any) -> int:
    return sum(_reduce_scatter(None, source, group) for source in sources)


def _all_reduce(tensors: Any, group: Any, *_: Any) -> int:
    size = _group(group).size()
    return 2 * _size(tensors) * (size - 1) // size


def _broadcast(tensors: Any, group: Any, root: int, *_: Any) -> int:
    group = _group(group)
    return _size(tensors) * (group.size() - 1) if group.rank() == root else 0


def _reduce(tensors: Any, group: Any, _op: Any, root: int, *_: Any) -> int:
    return _size(tensors) if _group(group).rank() != root else 0


def _gather(_outputs: Any, sources: Any, group: Any, root: int, *_: Any) -> int:
    return _size(sources) if _group(group).rank() != root else 0


def _scatter(_outputs: Any, sources: Any, group: Any, root: int, *_: Any) -> int:
    rank = _group(group).rank()
    return _size(sources) - _size([pieces[rank] for pieces in sources]) if rank == root else 0


_SILENT = {"recv_", "recv_any_source_", "barrier", "monitored_barrier_", "check_for_nan"}
_SENT: dict[str, Callable[..., int]] = {
    "send": _send,
    "alltoall_base_": _all_to_all_single,
    "alltoall_": _all_to_all,
    "allgather_": _all_gather,
    "allgather_coalesced_": _all_gather,
    "_allgather_base_": _all_gather,
    "allgather_into_tensor_coalesced_": _all_gather,
    "reduce_scatter_": _reduce_scatter,
    "_reduce_scatter_base_": _reduce_scatter,
    "reduce_scatter_tensor_coalesced_": _reduce_scatter_tensors,
    "allreduce_": _all_reduce,
    "allreduce_coalesced_": _all_reduce,
    "broadcast_": _broadcast,
    "reduce_": _reduce,
    "gather_": _gather,
    "scatter_": _scatter,
}
