"""Attention of the last tokens of a sequence to a cache that is cut over ranks."""

from __future__ import annotations

from torch import Tensor

from usp.attention.functional import long_context_attention
from usp.distributed.agreement import refuse_together
from usp.distributed.mesh import SequenceMesh
from usp.nn.cache import ShardedCache
from usp.planning.kinds import integer, tensor
from usp.planning.layout import Layout, Layouts, check_layout


def decode_attention(
    q: Tensor,
    cache: ShardedCache,
    mesh: SequenceMesh | None = None,
    *,
    layout: Layout | None = None,
    seq_len: int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    validate: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention of the last tokens to all that a cache holds, theirs among them.

    Every rank attends to the keys that it has, and ``(out, lse)`` is merged in one all-reduce: a
    reduce-scatter of its rows, which merges, and an all-gather, along each axis of the mesh that
    has several ranks. Tree attention (arXiv:2408.04093) does the same in three all-reduces. What
    is sent does not depend on how long the sequence is; the formula is that of ``bytes_sent`` in
    ``usp/planning/cost.py``.

    Args:
        q: (B, Lq, H, D), dtype and device of the cache; H is a multiple of its G. The last Lq
            tokens of the sequence, which are in the cache already; the same on every rank.
        cache: It says who sees whom: causal, its window, its first keys, its padding.
        mesh: That of the cache.
        layout: Where queries are cut, too (a chunk of a prompt that was extended by): how. Then q
            is this rank's shard, and keys or queries move as in ``long_context_attention``; on
            meshes of a ring alone.
        seq_len: Queries of all ranks, where they are cut by a rule.
        softmax_scale, softcap, alibi_slopes, sinks, return_lse, backend, validate: See
            ``long_context_attention``.

    Returns:
        out: (B, Lq, H, Dv), with the same bits on every rank; this rank's shard if queries are cut.
        With ``return_lse`` also (B, H, Lq). q and sinks have gradients, the cache has none.

    Raises:
        TypeError, ValueError: what does not fit; the mesh is not that of the cache, there are more
            queries than tokens, or ranks hold different caches.
        NotImplementedError: queries are cut on a mesh with ``ulysses_degree`` above 1.
    """
    try:
        first, layouts, whole = _placed(q, cache, mesh, layout, seq_len)
    except Exception as refusal:  # of a cache, say, that is another than those of other ranks
        refuse_together(mesh, "long_context_attention", validate, refusal)
        raise
    return long_context_attention(
        q, cache.k, cache.v, mesh,
        mask=cache.masks(),
        query_offset=first,
        softmax_scale=softmax_scale,
        layout=layouts,
        seq_len=whole,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        return_lse=return_lse,
        backend=backend,
        queries="replicated" if layout is None else "sharded",
        validate=validate,
    )  # fmt: skip


def _placed(
    q: Tensor,
    cache: ShardedCache,
    mesh: SequenceMesh | None,
    layout: Layout | None,
    seq_len: int | None,
) -> tuple[int, Layouts, tuple[int, int] | None]:
    """Position of the first query, layouts, and whole lengths where queries are cut."""
    if not isinstance(cache, ShardedCache):
        raise TypeError(f"cache must be a usp.ShardedCache, got a {type(cache).__name__}")
    if mesh is not cache.mesh:
        raise ValueError(f"mesh is {mesh}, but the cache was made with {cache.mesh}: pass that")
    if tensor("q", q).dim() != 4:
        raise ValueError(
            f"q must be (batch, sequence, heads, head_dim), got shape {tuple(q.shape)}"
        )
    cut = "contiguous" if layout is None else check_layout(layout)
    layouts: Layouts = (cut, cache.layout)
    if layout is None:
        queries, whole = q.shape[1], None
    else:
        queries = _all_queries(q, layout, seq_len, mesh)
        whole = queries, cache.length
    first = cache.length - queries
    if first < 0:
        raise ValueError(
            f"q has {queries} queries, but the cache holds {cache.length} tokens: queries are its "
            "last tokens, append their keys first"
        )
    cache.refuse_dropped(first, f"{queries} queries")
    return first, layouts, whole


def _all_queries(q: Tensor, layout: Layout, seq_len: int | None, mesh: SequenceMesh | None) -> int:
    if mesh is not None and mesh.ulysses_degree > 1:
        raise NotImplementedError(
            f"queries that are cut (layout={layout!r}) over a mesh of ulysses_degree "
            f"{mesh.ulysses_degree} exchange heads, and keys of a cache do not: make the mesh a "
            "ring (ulysses_degree=1), or give all queries to every rank (layout=None)"
        )
    if seq_len is not None:
        return integer("seq_len", seq_len, least=0)
    if not isinstance(layout, str):
        return layout.seq_len
    raise ValueError(f"layout={layout!r} says no length: pass seq_len=, the queries of all ranks")
