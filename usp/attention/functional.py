"""The function: arguments are checked once, and everything below can rely on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from usp.attention import compiled
from usp.attention.arguments import (
    Alone,
    Options,
    Request,
    Tensors,
    check,
    check_alone,
    complete,
    facts,
    slopes_of,
)
from usp.attention.hybrid import hybrid_attention, make_call
from usp.distributed.agreement import check_on_all_ranks, meet_in_backward, meets, new_name
from usp.distributed.comm import untraced
from usp.distributed.mesh import SequenceMesh
from usp.planning.layout import DocumentZigzag, Layout, summed_length


def long_context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: SequenceMesh | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    cu_seqlens: Sequence[int] | Tensor | None = None,
    prefix_len: int | None = None,
    softmax_scale: float | None = None,
    layout: Layout = "contiguous",
    seq_len: int | tuple[int, int] | None = None,
    key_padding_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    transport: str = "ring",
    return_lse: bool = False,
    backend: str = "auto",
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
            key lengths differ).
        window_size: (left, right) keys visible on each side of the query's own position, None
            is no bound.
        cu_seqlens: Global boundaries ``(0, ..., total)`` of packed documents, host integers.
        prefix_len: First keys that ``causal`` opens to every query; a window still closes them.
        softmax_scale: Factor of ``<q, k>``, dimensionless; D ** -0.5 by default.
        layout: "contiguous", "zigzag", "striped" or ``DocumentZigzag(cu_seqlens)``: which
            tokens this rank holds, as ``shard_sequence`` cut them.
        seq_len: Tokens of the whole sequence, or (query, key) lengths; by default the sum of what
            the ranks hold, which they tell each other at this call.
        key_padding_mask: (B, Lk) bool, True = ignore. This rank's keys.
        attn_bias: (B|1, H|1, Lq|1, all keys) added to the scores, keys in global order;
            differentiable. A dim of size 1 is the same on all ranks, and its gradient is this
            rank's part of the sum.
        dropout_p: Probability to drop a weight. The pattern depends on global positions and
            heads and one number of torch's default CPU generator, that of the mesh's first rank.
        dropout_seed: That number, 0 to 2**64 - 1, the same on all ranks; by default each rank
            draws one, and the first tells the others.
        softcap: Scores become ``softcap * tanh(score / softcap)``, before bias and ALiBi.
        alibi_slopes: (H,) or (B, H): minus slope times distance of global positions is added.
        transport: "ring" passes blocks of keys, "allgather" gathers them in one collective.
        return_lse: Also return the LSE.
        backend: "auto", or one of ``usp.backends()`` by name, which never falls back.
        validate: Whether the ranks compare their arguments first, and in the backward whose it is,
            so that a difference raises on every rank instead of hanging or computing something
            else: a message of 48 bytes along each axis of the mesh, 0.2 ms on 2 processes of one
            machine. True: always. None: on CPUs always; on other devices, where it may have to
            wait for them, only if there is something to ask: neither ``seq_len`` nor the layout
            says the length, or a dropout seed is drawn. False: never; then ranks that differ
            hang or are wrong, a length is local tokens times ranks, and a drawn seed one's own.

    Returns:
        (B, Lq, H, Dv) in the dtype of q; rows that see nothing are 0. With ``return_lse`` also
        (B, H, Lq) natural log of the sum of exp(score), fp32 (fp64 for fp64), -inf for those
        rows; both differentiable.

    Raises:
        TypeError: an argument is of another kind: a bool or float for an integer, a nested,
            sparse or distributed tensor, a list for a tensor; says what to do.
        ValueError: arguments do not fit each other, this rank's shard, or (``validate``) those
            of another rank; names both values. In the backward: ranks run it for other calls.
        NotImplementedError: no backend takes the problem; gives each one's reasons.

    Source:
        Ulysses arXiv:2309.14509, ring attention arXiv:2310.01889, both on one mesh
        arXiv:2405.07719.
    """
    options = Options(
        causal,
        window_size,
        cu_seqlens,
        prefix_len,
        softmax_scale,
        layout,
        seq_len,
        dropout_p,
        softcap,
        transport,
        return_lse,
        backend,
    )
    q, k, v = _autocast(q), _autocast(k), _autocast(v)
    tensors = Tensors(q, k, v, key_padding_mask, attn_bias, alibi_slopes)
    if torch.compiler.is_compiling() and (mesh is None or mesh.size == 1):
        return compiled.one_device_attention(tensors, options, dropout_seed)
    return _attend(tensors, options, mesh, dropout_seed, validate)


@untraced
def _attend(
    tensors: Tensors,
    options: Options,
    mesh: SequenceMesh | None,
    dropout_seed: int | None,
    validate: bool | None,
) -> Tensor | tuple[Tensor, Tensor]:
    drawn = draw_dropout_seed() if options.dropout_p and dropout_seed is None else None
    name = None
    asks = drawn is not None or not _names_lengths(options)
    if mesh is not None and meets(mesh, validate, asks):
        request, name = _agree(tensors, options, mesh, dropout_seed, drawn)
    else:
        request = check(tensors, options, mesh, dropout_seed or drawn or 0)
    tensors = tensors._replace(alibi_slopes=slopes_of(tensors))
    out, lse = hybrid_attention(tensors, make_call(tensors, request, mesh))
    if mesh is not None and name is not None:
        meet_in_backward(out, mesh, name)
    return out if lse is None else (out, lse)


def _agree(
    tensors: Tensors,
    options: Options,
    mesh: SequenceMesh,
    dropout_seed: int | None,
    drawn: int | None,
) -> tuple[Request, int]:
    """The arguments, checked together with all ranks, and the name of this call.

    Whole lengths that nobody named are the sum of what the ranks hold, and a seed that they drew
    is that of the first.
    """

    def complete_with(alone: Alone, lengths: tuple[int, int], seed: int) -> Request:
        return complete(alone, lengths, tensors, options, mesh, seed)

    def check_here() -> Alone:
        alone = check_alone(tensors, options)
        if alone.lengths is not None:
            complete_with(alone, alone.lengths, 0)  # that the others hear of it
        return alone

    alone, told = check_on_all_ranks(
        mesh,
        "long_context_attention",
        check_here,
        lambda alone: facts(tensors, options, alone, dropout_seed if drawn is None else None),
        lambda: (tensors.q.shape[1], tensors.k.shape[1], drawn or 0, new_name()),
    )
    queries, keys, seeds, names = zip(*told, strict=True)
    lengths = alone.lengths
    if lengths is None:
        degrees = mesh.ring_degree, mesh.ulysses_degree
        lengths = (
            summed_length("q", queries, options.layout, degrees),
            summed_length("k", keys, options.layout, degrees),
        )
    seed = dropout_seed or 0 if drawn is None else seeds[0]
    return complete_with(alone, lengths, seed), names[0]


def _names_lengths(options: Options) -> bool:
    return options.seq_len is not None or isinstance(options.layout, DocumentZigzag)


def _autocast(x: Tensor) -> Tensor:
    """The tensor in autocast's dtype where it is on, as torch's own attention does."""
    if not isinstance(x, Tensor) or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


def draw_dropout_seed() -> int:
    """One number of torch's default CPU generator."""
    return int(torch.randint(2**62, (), device="cpu"))
