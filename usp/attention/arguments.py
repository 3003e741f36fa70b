"""What a caller asks for, checked once: shapes, dtypes, lengths and options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from usp.attention import masking
from usp.attention.chunk_options import refuse_chunks
from usp.attention.given import Options, Tensors
from usp.attention.masking import make_masks, refuse_attn_mask, refuse_lengths
from usp.attention.placement import refuse_placement
from usp.attention.shapes import check_extras, check_heads, check_latents, check_qkv, check_sinks
from usp.backends import Backend, check_name, select
from usp.distributed.agreement import LENGTH_ADVICE, Advised, Facts
from usp.distributed.mesh import SequenceMesh, degrees_and_place
from usp.distributed.transport import check_transport
from usp.kernels import architecture
from usp.planning.kinds import device_type, integer, real
from usp.planning.layout import Layout, both, replicated
from usp.planning.problem import Scoring, Traits, state_dtype
from usp.planning.samples import Masks
from usp.planning.shares import named_lengths, row_pieces


@dataclass(frozen=True, eq=False)
class Request:
    """Options and tensors that fit together.

    Attributes:
        masks, layouts, scoring, transport, backend, return_lse: What to compute, and how.
        query_len, key_len: Tokens of the whole sequences.
        num_heads, num_kv_heads: Heads of this call.
        first_head, all_heads: Where they stand among those of the whole attention.
        latent_width: Numbers of a token that keys and values are made of, where they are.
        query_lengths, key_lengths: Local tokens of each rank of this rank's row; where a side is
            on every rank, just its own.
        chunks, head_chunks, offload: In how many pieces, and where what waits does.
    """

    masks: Masks
    layouts: tuple[Layout, Layout]
    scoring: Scoring
    transport: str
    backend: Backend
    return_lse: bool
    query_len: int
    key_len: int
    num_heads: int
    num_kv_heads: int
    first_head: int
    all_heads: int
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    latent_width: int | None = None
    chunks: int = 1
    head_chunks: int = 1
    offload: str | None = None

    @property
    def in_chunks(self) -> bool:
        """Whether it is worked off piece by piece, or kept elsewhere."""
        return (self.chunks, self.head_chunks, self.offload) != (1, 1, None)


@dataclass(frozen=True, eq=False)
class Alone:
    """What fits together as far as it can be told without the lengths of whole sequences.

    Attributes:
        masks, scoring, backend: As in ``Request``, but for the seed of dropout.
        lengths: Queries and keys of the whole sequences where they were named.
        heads: First query head of this call, and number of heads of the whole attention.
    """

    masks: Masks
    scoring: Scoring
    backend: Backend
    lengths: tuple[int, int] | None
    heads: tuple[int, int]


def check(
    tensors: Tensors, options: Options, mesh: SequenceMesh | None, dropout_seed: int
) -> Request:
    """Everything that one rank can check by itself.

    Raises:
        TypeError, ValueError: sizes, dtypes, devices or options that do not fit; names both sides.
        NotImplementedError: no backend takes the problem; gives each one's reasons.
    """
    alone = check_alone(tensors, options)
    lengths = alone.lengths or (tensors.q.shape[1], tensors.k.shape[1])  # then it is all there is
    return complete(alone, lengths, tensors, options, mesh, dropout_seed)


def check_alone(tensors: Tensors, options: Options) -> Alone:
    """The first half of ``check``: all but the lengths of whole sequences."""
    both(options.layout)
    check_name(options.backend)
    check_transport(options.transport)
    lengths = named_lengths(options.seq_len, options.layout)
    if options.latents is not None:
        check_latents(tensors.q, options.latents)
    check_qkv(tensors.q, tensors.k, tensors.v)
    check_extras(tensors)
    refuse_placement(tensors, options)
    refuse_chunks(options)
    if options.transport in ("queries", "query_ring", "grid") and tensors.attn_bias is not None:
        raise NotImplementedError(
            f"transport={options.transport!r} moves no attn_bias with its queries: leave "
            "transport='auto'"
        )
    if options.attn_mask is not None:
        refuse_attn_mask(options.attn_mask)
    if options.sinks is not None:
        check_sinks(options.sinks, tensors)
    masks = make_masks(options, tensors.q.shape[0])
    scoring = _scoring(options, tensors.q.shape[3])
    backend = select(options.backend, traits_of(tensors, scoring, options.return_lse))
    return Alone(masks, scoring, backend, lengths, check_heads(options.heads, tensors))


def complete(
    alone: Alone,
    lengths: tuple[int, int],
    tensors: Tensors,
    options: Options,
    mesh: SequenceMesh | None,
    dropout_seed: int,
) -> Request:
    """The second half of ``check``: what is told may differ between ranks in shares alone.

    Args:
        lengths: Queries and keys of the whole sequences.
    """
    (query_len, key_len), layouts = lengths, both(options.layout)
    _check_grid(options, mesh)
    _check_whole(tensors, alone, lengths)
    query_lengths = _row_pieces("q", tensors.q.shape[1], query_len, layouts[0], mesh)
    key_lengths = _row_pieces("k", tensors.k.shape[1], key_len, layouts[1], mesh)
    if replicated(layouts):  # heads change no hands
        query_lengths, key_lengths = (tensors.q.shape[1],), (tensors.k.shape[1],)
    return Request(
        masks=alone.masks,
        layouts=layouts,
        scoring=replace(alone.scoring, dropout_seed=dropout_seed)
        if dropout_seed
        else alone.scoring,
        transport=options.transport,
        backend=alone.backend,
        return_lse=options.return_lse,
        query_len=query_len,
        key_len=key_len,
        num_heads=tensors.q.shape[2],
        num_kv_heads=tensors.k.shape[2],
        first_head=alone.heads[0],
        all_heads=alone.heads[1],
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        latent_width=None if options.latents is None else options.latents.width,
        chunks=int(options.chunks),
        head_chunks=int(options.head_chunks),
        offload=options.offload,
    )


def _check_grid(options: Options, mesh: SequenceMesh | None) -> None:
    if options.transport != "grid":
        return
    if options.latents is not None:
        raise NotImplementedError("transport='grid' moves no latents: leave transport='auto'")
    if mesh is not None and mesh.ring_degree > 1 and mesh.ring_levels is None:
        raise ValueError(
            f"transport='grid' needs a ring of two levels, and of ring_degree {mesh.ring_degree} "
            f"ring_outer_degree is {mesh.ring_outer_degree}: usp.init_mesh(ring_outer_degree=) "
            "of a number between them that divides the ring"
        )


def _check_whole(tensors: Tensors, alone: Alone, lengths: tuple[int, int]) -> None:
    """What must fit the whole sequences."""
    query_len, key_len = lengths
    bias = tensors.attn_bias
    if bias is not None and bias.shape[3] != key_len:
        raise ValueError(
            "attn_bias must be (batch|1, heads|1, local queries|1, all keys), and there are "
            f"{key_len} keys in the whole sequence, got {tuple(bias.shape)}"
        )
    refuse_lengths(alone.masks, query_len, key_len)


def _row_pieces(
    name: str, length: int, seq_len: int, layout: Layout, mesh: SequenceMesh | None
) -> tuple[int, ...]:
    """Local tokens of each rank of this rank's row; this rank must have its share."""
    (ring, ulysses), place = degrees_and_place(mesh)
    row = row_pieces(layout, seq_len, ring, ulysses)[place[0]]
    if length != row[place[1]]:
        raise ValueError(
            f"{name} has {length} local tokens, but layout {_layout_name(layout)} gives ring rank "
            f"{place[0]}, ulysses rank {place[1]} of {ring} x {ulysses} {row[place[1]]} of "
            f"{seq_len} tokens: cut with usp.shard_sequence and pass seq_len= (a pair of query "
            "and key lengths where they differ)"
        )
    return row


def _layout_name(layout: Layout) -> str:
    return layout if isinstance(layout, str) else type(layout).__name__


def _scoring(options: Options, head_dim: int) -> Scoring:
    dropout_p = real("dropout_p", options.dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    softcap = 0.0 if options.softcap is None else real("softcap", options.softcap)
    if softcap < 0:
        raise ValueError(f"softcap must be positive (None for none), got {softcap}")
    scale = options.softmax_scale
    scale = head_dim**-0.5 if scale is None else real("softmax_scale", scale)
    return Scoring(scale, softcap, dropout_p)


def traits_of(tensors: Tensors, scoring: Scoring, returns_lse: bool) -> Traits:
    """What a backend must know to say whether it takes the problem."""
    return Traits(
        device_type=tensors.q.device.type,
        dtype=tensors.q.dtype,
        head_dim=tensors.q.shape[3],
        value_head_dim=tensors.v.shape[3],
        softmax_scale=scoring.softmax_scale,
        bias=tensors.attn_bias is not None or tensors.key_padding_mask is not None,
        softcap=scoring.softcap > 0,
        alibi=tensors.alibi_slopes is not None,
        dropout=scoring.dropout_p > 0,
        returns_lse=returns_lse,
        architecture=architecture(tensors.q.device),
        device=tensors.q.device,
    )


def slopes_of(tensors: Tensors) -> Tensor | None:
    """ALiBi slopes as (B|1, H) in the dtype of the state."""
    slopes = tensors.alibi_slopes
    if slopes is None:
        return None
    return slopes.to(state_dtype(tensors.q.dtype)).view(-1, tensors.q.shape[2])


def drops(dropout_p: object) -> bool:
    """Whether a seed is needed; what is no probability is refused later, on all ranks."""
    return isinstance(dropout_p, Real) and float(dropout_p) > 0


def seed_of(dropout_seed: int | None) -> int | None:
    """A seed of 64 bits as kernels take it: their integers have a sign.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below 0 or has more than 64 bits.
    """
    if dropout_seed is None:
        return None
    seed = integer("dropout_seed", dropout_seed, least=0)
    if seed >= 2**64:
        raise ValueError(f"dropout_seed must be below 2**64, got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def needs_gradients(tensors: Tensors) -> list[bool]:
    """Of q, k, v and bias."""
    of = tensors.q, tensors.k, tensors.v, tensors.attn_bias
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in of]


def facts(
    tensors: Tensors,
    options: Options,
    alone: Alone,
    dropout_seed: int | None,
    gradients: Sequence[bool],
) -> Facts:
    """What all ranks of a mesh must agree on, by name."""
    q, v, bias = tensors.q, tensors.v, tensors.attn_bias
    layouts = both(options.layout)
    told: Facts = {
        "batch size": q.shape[0],
        "number of query heads": q.shape[2],
        "number of key heads": v.shape[2],
        "heads (first, total)": alone.heads,
        "head_dim": (q.shape[3], v.shape[3]),
        "dtype": q.dtype,
        "device type": device_type(q),
        "seq_len": Advised(alone.lengths or "not given", LENGTH_ADVICE),
        masking.NAMES: alone.masks,
        "layout": layouts[0] if layouts[0] == layouts[1] else layouts,
        "scoring (softmax_scale, softcap, dropout_p)": alone.scoring,
        "dropout_seed": "drawn" if dropout_seed is None else dropout_seed,
        "transport": options.transport,
        "return_lse": options.return_lse,
        "sinks": options.sinks is not None,
        "key_padding_mask": tensors.key_padding_mask is not None,
        "attn_bias": None if bias is None else (bias.dtype, *bias.shape[:2], bias.shape[3]),
        "alibi_slopes": None if tensors.alibi_slopes is None else tensors.alibi_slopes.tolist(),
        # what it took need not be alike: one machine's kernels may be wrong, or not measured
        "backend": options.backend,
        "chunks (of tokens, of heads)": (options.chunks, options.head_chunks),
        "offload": options.offload,
        "gradients needed": list(gradients),
    }
    if options.latents is not None:
        widths = options.latents.latent.shape[2], options.latents.rope_key.shape[2]
        told["dims of latent and rope_key"] = widths
    if bias is not None and q.shape[1] != 1:
        told["queries of attn_bias"] = "one for all" if bias.shape[2] == 1 else "one each"
    return told
