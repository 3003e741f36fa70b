"""The function: arguments are checked once, and everything below can rely on them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from usp.attention import op
from usp.attention.arguments import drops
from usp.attention.attn_mask import with_attn_mask
from usp.attention.chunk_options import in_chunks, refuse_graphs
from usp.attention.chunked import chunked_attention
from usp.attention.given import Options, Tensors
from usp.attention.hybrid import Call, hybrid_attention, prepare
from usp.attention.kept import keep, kept, kind_of
from usp.attention.learned import with_learned_scale
from usp.attention.placement import with_placement
from usp.attention.request import agree_on_request
from usp.attention.sinks import beside_sinks
from usp.attention.watched import is_eager, seen_whole
from usp.distributed.agreement import When, refuse_together
from usp.distributed.comm import untraced
from usp.distributed.mesh import SequenceMesh
from usp.ops.derivatives import refuse_transforms
from usp.ops.precision import in_autocast
from usp.planning.kinds import flag
from usp.planning.layout import Layouts
from usp.planning.masks.mask import Mask


def long_context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: SequenceMesh | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    cu_seqlens: Sequence[int] | Tensor | Sequence[Sequence[int]] | None = None,
    prefix_len: int | None = None,
    mask: Mask | Sequence[Mask] | None = None,
    attn_mask: Tensor | None = None,
    key_lengths: Sequence[int] | Tensor | None = None,
    query_offset: int | Sequence[int] | Tensor = 0,
    softmax_scale: float | Tensor | None = None,
    layout: Layouts = "contiguous",
    seq_len: int | tuple[int, int] | str | None = None,
    key_padding_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    transport: str = "auto",
    return_lse: bool = False,
    backend: str = "auto",
    chunks: int = 1,
    head_chunks: int = 1,
    offload: str | None = None,
    heads: tuple[int, int] | None = None,
    queries: str = "sharded",
    keys: str = "sharded",
    validate: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention over a sequence that is spread over the ranks of a mesh.

    Every rank of the mesh calls it with its own shard and the same options. The result does not
    depend on the mesh, the layout, the transport or the backend.

    Args:
        q: (B, Lq, H, D) fp16 | bf16 | fp32 | fp64. This rank's queries.
        k: (B, Lk, G, D), dtype and device of q; H is a multiple of G. This rank's keys.
        v: (B, Lk, G, Dv), like k.
        mesh: The ranks that share the sequence; None is one device.
        causal: Hide keys after the query's own global position (top-left also where query and
            key lengths differ: see ``query_offset``).
        window_size: (left, right) keys visible on each side of the query's own position, None
            is no bound.
        cu_seqlens: Global boundaries ``(0, ..., total)`` of packed documents, host integers; or a
            list of them, one a sample.
        prefix_len: First keys that ``causal`` opens to every query; a window still closes them.
        mask: Who sees whom beside these options, of ``usp.masks``; or a list of one a sample.
            Neighbours with equal masks share calls.
        attn_mask: (Lq, all keys) or (B|1, H|1, Lq|1, all keys) bool, True where this rank's query
            sees the key (torch's meaning in ``scaled_dot_product_attention``). Where all queries
            are here, on a CPU, and its rows are a few runs of keys, it is planned as ``mask``;
            else it is a bias.
        key_lengths: (B,) host integers: each sample has so many keys, the rest is padding that is
            neither computed nor sent.
        query_offset: Position of the first query among the keys, for all or for each sample: one
            query behind 40 cached keys is at 40. Keys minus queries aligns both ends, as
            flash-attn does.
        softmax_scale: Factor of ``<q, k>``, dimensionless; D ** -0.5 by default. A tensor of one
            number is multiplied with q, and has a gradient: this rank's part of the sum.
        layout: "contiguous", "zigzag", "striped", ``DocumentZigzag(cu_seqlens)`` or
            ``Held(counts)``: which tokens this rank holds, as ``shard_sequence`` cut them. Or two
            of them, ``(of queries, of keys)``.
        seq_len: Tokens of the whole sequence, or (query, key) lengths; by default ("infer") the
            sum of what the ranks hold, which they tell each other at this call. ``usp.Spread`` asks
            once for many calls.
        key_padding_mask: (B, Lk) bool, True = ignore. This rank's keys.
        attn_bias: (B|1, H|1, Lq|1, all keys) added to the scores, keys in global order;
            differentiable. A dim of size 1 is the same on all ranks, and its gradient is this
            rank's part of the sum. -inf hides a key, and so does the lowest number of its dtype
            (in fp32 and fp64 also that of bf16), with which masks are filled: a row of nothing
            else sees nothing. Any other offset that all keys of a row share, of whatever size,
            leaves its result as it is. On a GPU the host waits for a look at the values.
        dropout_p: Probability to drop a weight. The pattern depends on global positions and
            heads and one number of torch's default CPU generator, that of the mesh's first rank.
        dropout_seed: That number, 0 to 2**64 - 1, the same on all ranks; by default each rank
            draws one, and the first tells the others.
        softcap: Scores become ``softcap * tanh(score / softcap)``, before bias and ALiBi.
        alibi_slopes: (H,) or (B, H): minus slope times distance of global positions is added.
        sinks: (H,) a logit of each head that takes its share of every row's weights and gives
            nothing. Its gradient is this rank's part of the sum.
        transport: "ring" passes blocks of keys from rank to rank, "direct" sends rows straight to
            those who see them, "allgather" gathers all in one collective, "queries" sends queries
            to the keys that they see and merges what is found there; "query_ring" passes keys
            as "ring" does, and in the backward queries in their place; "grid", on a ring of two
            levels, moves queries in a node and keys between nodes (these three without
            ``attn_bias``). "auto" takes what sends least in each pass, of keys, queries and a
            grid, and for keys the ring where it sends no row more than "direct" would.
        return_lse: Also return the LSE.
        backend: "auto", or one of ``usp.backends()`` by name, which never falls back.
        chunks: In how many pieces of its tokens a rank is to work off the call, at most one a
            token: what is exchanged, received and summed up is there for a piece at a time, and
            the bytes that are sent are the same (``docs/offload.md``).
        head_chunks: In how many groups of its heads, at most one a key head; both compose.
        offload: "cpu": keys, values and what the backward needs wait in pinned memory of the host,
            two pieces of them on the device; on a CPU they stay where they are.
        heads: (first, total): which of how many query heads these are, where others are
            computed elsewhere, as by the ranks of tensor parallelism. What dropout drops is then
            that of the whole attention. Slopes and biases are those of the heads here.
        queries: "sharded", or "replicated": every rank holds the same, all queries. Each computes
            them against its own keys, results are merged on all ranks, and no key moves. The
            gradient of q is this rank's part of the sum, and those of out and LSE are added up:
            a loss that all ranks compute alike is divided by ``mesh.size``. Not with
            ``attn_bias``. ``layout`` and ``seq_len`` are then of the keys.
        keys: "sharded", or "replicated": every rank holds all keys and values (a text beside an
            image that is cut), and nothing is sent. Their gradients, and that of ``attn_bias``,
            are this rank's part of the sum. ``layout`` and ``seq_len`` are then of the queries.
        validate: Whether the ranks compare their arguments first, and in the backward whose it is,
            so that a difference raises on every rank instead of hanging or computing something
            else: a message of 48 bytes along each axis of the mesh. True: always. None: on
            CPUs always; on other devices, where it may
            have to wait for them, only if there is something to ask: neither ``seq_len`` nor the
            layout says the length, or a dropout seed is drawn. False: only for a length that
            nobody says; ranks that differ otherwise hang or are wrong, and a drawn seed is one's
            own. The same on all ranks: no message says that a rank sends none, so that those that
            compare would wait for one that does not.

    Returns:
        (B, Lq, H, Dv) in the dtype of q; rows that see nothing are 0. With ``return_lse`` also
        (B, H, Lq) natural log of the sum of exp(score), fp32 (fp64 for fp64), -inf for those
        rows; both differentiable. With ``sinks`` it contains them.

    Raises:
        TypeError: an argument is of another kind: a bool or float for an integer, a nested,
            sparse or distributed tensor, a list for a tensor; says what to do.
        ValueError: arguments do not fit each other, this rank's shard, or (``validate``) those
            of another rank; names both values. In the backward: ranks run it for other calls.
        NotImplementedError: no backend takes the problem, or the one that was named was found
            wrong on this machine; gives each one's reasons.

    Source:
        Ulysses arXiv:2309.14509, ring attention arXiv:2310.01889, both on one mesh
        arXiv:2405.07719.
    """
    told = {
        "causal": causal,
        "window_size": window_size,
        "cu_seqlens": cu_seqlens,
        "prefix_len": prefix_len,
        "mask": mask,
        "key_lengths": key_lengths,
        "query_offset": query_offset,
        "softmax_scale": softmax_scale,
        "layout": layout,
        "seq_len": seq_len,
        "dropout_p": dropout_p,
        "softcap": softcap,
        "transport": transport,
        "return_lse": return_lse,
        "backend": backend,
        "chunks": chunks,
        "head_chunks": head_chunks,
        "offload": offload,
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "attn_mask": attn_mask,
        "sinks": sinks,
    }
    tensors = Tensors(q, k, v, key_padding_mask, attn_bias, alibi_slopes)
    return attend(tensors, told, mesh, dropout_seed, validate)


def attend(
    tensors: Tensors,
    told: dict[str, Any],
    mesh: SequenceMesh | None,
    dropout_seed: int | Tensor | None,
    validate: When,
) -> Tensor | tuple[Tensor, Tensor]:
    """``long_context_attention`` with its arguments in two parts; ``validate`` may be "first", and
    the seed a tensor, while a graph is made. A mesh of one rank is none.

    Args:
        told: Options by name. They become an object where a call is of a new kind alone.
    """
    if torch._C._is_any_autocast_enabled():
        q, k, v = in_autocast(tensors.q), in_autocast(tensors.k), in_autocast(tensors.v)
        tensors = tensors._replace(q=q, k=k, v=v)
    mesh = None if isinstance(mesh, SequenceMesh) and mesh.size == 1 else mesh
    may_keep = mesh is None and dropout_seed is None and is_eager()
    kind = kind_of(tensors, told, validate) if may_keep else None
    found = kept(kind, tensors)
    if found is not None:
        return _attended(*found, None)
    tensors, options = prepared(tensors, Options(**told), mesh, validate)
    if told.get("attn_mask") is not None:
        # what its values are is known by now
        kind = kind_of(tensors, vars(options), validate) if may_keep else None
        found = kept(kind, tensors)
        if found is not None:
            return _attended(*found, None)
    return beside_sinks(
        options, lambda told: _dispatched(tensors, told, mesh, dropout_seed, validate, kind)
    )


def prepared(
    tensors: Tensors, options: Options, mesh: SequenceMesh | None, validate: When
) -> tuple[Tensors, Options]:
    """With a scale that is learned, sides that are replicated and a boolean mask told as all
    below takes them.

    Raises:
        TypeError, NotImplementedError: what cannot be told so, on every rank that meets.
    """
    try:
        if not torch.compiler.is_compiling():
            refuse_transforms(tensors)
        flag("return_lse", options.return_lse)  # here, for sinks need it whatever it says
        tensors, options = with_learned_scale(tensors, options)
        options = with_placement(tensors, options)
        if options.attn_mask is None:
            return tensors, options
        return with_attn_mask(tensors, options, mesh is None)
    except Exception as refusal:  # whatever it is, the others must not wait for this rank
        refuse_together(mesh, "long_context_attention", validate, refusal)
        raise


def _dispatched(
    tensors: Tensors,
    options: Options,
    mesh: SequenceMesh | None,
    dropout_seed: int | Tensor | None,
    validate: When,
    kind: Hashable | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    if in_chunks(options):
        try:
            refuse_graphs(tensors)
        except NotImplementedError as refusal:
            refuse_together(mesh, "long_context_attention", validate, refusal)
            raise
        return _attend_in_chunks(tensors, options, mesh, dropout_seed, validate, kind)
    found = seen_whole(op.attention, tensors, options, mesh, dropout_seed, validate)
    if found is not None:
        return found
    return _attend(tensors, options, mesh, cast("int | None", dropout_seed), validate, kind)


@untraced
def _attend_in_chunks(
    tensors: Tensors,
    options: Options,
    mesh: SequenceMesh | None,
    dropout_seed: int | Tensor | None,
    validate: When,
    kind: Hashable | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """No graph holds it: it is many collectives, and its memory that of none of its results."""
    seed = cast("int | None", dropout_seed)
    return _attend(tensors, options, mesh, seed, None if validate == "first" else validate, kind)


@untraced
def _attend(
    tensors: Tensors,
    options: Options,
    mesh: SequenceMesh | None,
    dropout_seed: int | None,
    validate: When,
    kind: Hashable | None,
) -> Tensor | tuple[Tensor, Tensor]:
    drawn = None
    if dropout_seed is None and drops(options.dropout_p):
        drawn = int(draw_dropout_seed())
    request, name = agree_on_request(tensors, options, mesh, dropout_seed, drawn, validate)
    tensors, call = prepare(tensors, request, mesh)
    keep(kind, tensors, options, call)
    return _attended(tensors, call.named(mesh, name), mesh)


def _attended(
    tensors: Tensors, call: Call, mesh: SequenceMesh | None
) -> Tensor | tuple[Tensor, Tensor]:
    if call.request.in_chunks:
        out, lse = chunked_attention(tensors, call, mesh)
    else:
        out, lse = hybrid_attention(tensors, call)
    return out if lse is None else (out, lse)


def draw_dropout_seed() -> Tensor:
    """One number of torch's default CPU generator, () int64."""
    return torch.randint(2**62, (), device="cpu")
