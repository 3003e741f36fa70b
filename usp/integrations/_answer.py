"""``scaled_dot_product_attention`` of the whole sequence, for what a rank holds of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from usp import rng
from usp.distributed.agreement import refuse_together
from usp.distributed.mesh import degrees_and_place
from usp.nn.spread import Spread
from usp.planning.kinds import integer
from usp.planning.shares import shares


@dataclass(frozen=True)
class Tokens:
    """What lengths mean where a sequence is spread.

    Attributes:
        spread: Who holds which tokens.
        whole: Lengths of other sequences, which every rank holds whole.
        shares: Tokens that each rank holds; a graph cannot count them.
        held: Those of this rank.
        cut: Whether the model itself was given this rank's tokens, so that all it makes is of
            these: positions, masks, what its outputs are.
        parts: Of two streams that attention joins, the tokens of the whole, in their order.
        ordered: Whether ranks hold these tokens in their order; else nothing may go by positions.
        each: Whether each of two streams was cut by itself.
        across: Where attention looks at other tokens, which every rank holds whole, how many
            queries a call may have: all of this rank, or those of a stream.
        streams: What ``_streams`` knows of the two, where there are two.
        documents: In a graph, boundaries of documents, which are read when it runs; elsewhere the
            Spread has them.
    """

    spread: Spread
    whole: frozenset[int]
    shares: tuple[int, ...]
    held: int
    cut: bool = False
    parts: tuple[int, int] | None = None
    ordered: bool = True
    each: bool = False
    across: tuple[int, ...] = ()
    streams: tuple[Any, Any] | None = field(default=None, compare=False, repr=False)
    documents: Tensor | None = field(default=None, compare=False, repr=False)
    _first: dict[int, int] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, spread: Spread, whole: Sequence[int], cut: bool = False) -> Tokens:
        """Raises:
        ValueError: ``whole`` names a length that some rank's tokens have, too.
        """
        others = frozenset(integer("whole", length, least=0) for length in whole)
        held = shares(spread.layout, spread.seq_len, *degrees_and_place(spread.mesh)[0])
        if len(held) > 1 and (mixed := others & {*held, spread.seq_len}):
            raise ValueError(
                f"whole={tuple(whole)} names {sorted(mixed)}, and ranks hold {held} of the "
                f"{spread.seq_len} tokens that are spread: which sequence is meant could not be "
                "told"
            )
        mine = held[0 if spread.mesh is None else spread.mesh.rank]
        return cls(spread, others, held, mine, cut)

    @property
    def is_alone(self) -> bool:
        """Whether attention among the tokens of this rank is that of the whole."""
        return len(self.shares) == 1 and self.spread.cu_seqlens is None

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``Spread.attention``, of these documents."""
        if self.documents is not None:
            options["cu_seqlens"] = self.documents
        return self.spread.attention(q, k, v, **options)

    def count_first(self, prefix: int) -> int:
        """How many of the first tokens of the whole this rank holds."""
        if prefix not in self._first:
            compiles = torch.compiler.is_compiling()
            count = torch.compiler.disable(_count_below) if compiles else _count_below
            self._first[prefix] = count(self.spread, prefix)
        return self._first[prefix]


def _count_below(spread: Spread, position: int) -> int:
    return int((spread.positions("cpu") < position).sum())


def answer(
    tokens: Tokens,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    pieces: Mapping[str, Any] = MappingProxyType({}),
) -> Tensor:
    """What the call means where tokens are spread; arguments and result as torch has them.

    Args:
        pieces: Of the region.

    Raises:
        ValueError, NotImplementedError: it cannot be told what the call means; names the lengths.
    """
    spread, whole = tokens.spread, tokens.whole
    queries, keys, held = query.shape[-2], key.shape[-2], tokens.held
    as_it_is = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale}
    as_it_is |= {"dropout_p": dropout_p, "enable_gqa": enable_gqa}
    if len(tokens.shares) == 1 and not queries == keys == held:
        return _of_torch(query, key, value, as_it_is)
    if tokens.across:
        return _of_others(tokens, query, key, value, as_it_is)
    if keys in whole and (queries in whole or (queries == held and not is_causal)):
        return _of_whole_keys(spread, queries in whole, query, key, value, as_it_is)
    try:
        _check(tokens, query, key, value, as_it_is)
    except ValueError as refusal:
        refuse(spread, refusal)
    q, k, v = _heads_behind_tokens(query, key, value, enable_gqa)
    options: dict[str, Any] = {"causal": is_causal, "softmax_scale": scale, "dropout_p": dropout_p}
    options |= pieces
    if attn_mask is not None:
        options |= _mask_options(tokens, attn_mask, query.shape, len(q))
    out = cast(Tensor, tokens.attention(q, k, v, **options)).transpose(1, 2)
    if _fit(query, key, value, enable_gqa):
        return out
    batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    dims = max(query.dim(), key.dim(), value.dim())
    return out.reshape(*batch, *out.shape[-min(3, dims) :])


def among(
    tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention among the tokens of the region, with options of ours.

    Args:
        query, key, value: As torch has them, this rank's tokens.

    Returns:
        (B, local tokens, heads, head dim), and the LSE where it is asked for.

    Raises:
        ValueError: they are no such tokens; names the lengths.
    """
    given = {"attn_mask": None, "is_causal": False, "enable_gqa": enable_gqa}
    try:
        _check(tokens, query, key, value, given)
    except ValueError as refusal:
        refuse(tokens.spread, refusal)
    q, k, v = _heads_behind_tokens(query, key, value, enable_gqa)
    return tokens.attention(q, k, v, **options)


def _check(
    tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> None:
    """Refuse what cannot be proven to be attention among the tokens of the region.

    Raises:
        ValueError: names both sides.
    """
    held, length, mask = tokens.held, tokens.spread.seq_len, options["attn_mask"]
    if not query.shape[-2] == key.shape[-2] == held:
        raise ValueError(_of_lengths(tokens, query.shape[-2], key.shape[-2]))
    heads = [x.shape[-3] if x.dim() > 2 else 1 for x in (query, key, value)]
    if not options["enable_gqa"] and len({*heads} - {1}) > 1:
        raise ValueError(
            f"query has {heads[0]} heads, key {heads[1]}, value {heads[2]}: pass enable_gqa=True "
            "where queries share key heads"
        )
    if options["enable_gqa"] and (heads[0] % heads[1] or heads[0] % heads[2]):
        raise ValueError(
            f"query has {heads[0]} heads, key {heads[1]} and value {heads[2]}, and "
            f"{heads[0]} is no multiple of both"
        )
    if not tokens.ordered and options["is_causal"]:
        raise ValueError(_of_order(tokens, "is_causal=True"))
    if mask is None:
        return
    if options["is_causal"]:
        raise ValueError("attn_mask and is_causal=True exclude each other, as in torch")
    rows, keys = (1, *mask.shape)[-2:]
    a_row = rows == 1 and (mask.dim() < 3 or mask.shape[-3] == 1)
    if not tokens.ordered and not (a_row and keys == held):
        raise ValueError(_of_order(tokens, f"attn_mask of {tuple(mask.shape)}"))
    if not (a_row and keys == held) and (rows not in (1, held, length) or keys not in (1, length)):
        raise ValueError(_of_mask(tokens, mask))
    if a_row and keys in (1, held) and keys != length and not _one_is_one(tokens):
        raise ValueError(
            f"attn_mask is {tuple(mask.shape)} where ranks hold {tokens.shares} of {length} "
            f"tokens: of a single token it could not be told whether it is of that token or of "
            f"all; pass all {length} keys"
        )


def _of_others(
    tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> Tensor:
    """Local queries and keys of another sequence, which every rank holds whole."""
    spread, queries, mask = tokens.spread, query.shape[-2], options["attn_mask"]
    if queries not in tokens.across or options["is_causal"]:
        causal = "causal " if options["is_causal"] else ""
        refusal = (
            f"{causal}attention of {queries} queries to {key.shape[-2]} keys of another sequence, "
            f"where this rank holds {sorted(tokens.across)} of {spread.seq_len} tokens: it must be "
            "of these, and not causal"
        )
        refuse(spread, ValueError(refusal))
    if mask is not None and mask.dim() > 1 and mask.shape[-2] == spread.seq_len:
        options = options | {"attn_mask": spread.shard(mask, -2)}
    return _of_whole_keys(spread, False, query, key, value, options)


def _of_whole_keys(
    spread: Spread, alike: bool, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> Tensor:
    """Keys that every rank holds: each query sees them here.

    Args:
        alike: Whether the queries are the same on all ranks, too, so that dropout must be.
    """
    if alike or not options["dropout_p"]:
        return _of_torch(query, key, value, options)
    with rng.sharded(spread.mesh):
        return _of_torch(query, key, value, options)


def _of_torch(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """As it stands, for regions around this one, too."""
    with torch._C.DisableTorchFunction():
        return F.scaled_dot_product_attention(query, key, value, **options)


def _heads_behind_tokens(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(..., H, L, D) -> (B, L, H, D), with what torch broadcasts brought to one shape."""
    if _fit(query, key, value, enable_gqa):
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    q, k, v = (x[(None,) * max(0, 4 - x.dim())] for x in (query, key, value))
    batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    q, k, v = (x.expand(*batch, *x.shape[-3:]).flatten(0, -4) for x in (q, k, v))
    if not enable_gqa:
        most = max(x.shape[1] for x in (q, k, v))
        q, k, v = (x.expand(-1, most, -1, -1) for x in (q, k, v))
    elif k.shape[1] != v.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _fit(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether they are of four dims, and there is nothing to broadcast: as nearly always."""
    q, k, v = query.shape, key.shape, value.shape
    if not len(q) == len(k) == len(v) == 4:
        return False
    return q[0] == k[0] == v[0] and k[1] == v[1] and (enable_gqa or q[1] == k[1])


def _mask_options(
    tokens: Tokens, mask: Tensor, query_shape: torch.Size, batch: int
) -> dict[str, Tensor]:
    """A mask of torch's, of whichever of its forms, as options of ours."""
    mask = mask[(None,) * max(0, 4 - mask.dim())]
    if len(query_shape) > 4 or mask.dim() > 4:
        mask = mask.expand(*query_shape[:-3], *mask.shape[-3:]).flatten(0, -4)
    spread, held, length = tokens.spread, tokens.held, tokens.spread.seq_len
    heads, rows, keys = mask.shape[1:]
    a_row = rows == heads == 1
    if a_row and keys in (1, held) and keys != length:  # what is for all keys is so for each
        own = mask.expand(-1, -1, -1, held)
        if mask.dtype == torch.bool:
            return {"key_padding_mask": ~own[:, 0, 0].expand(batch, -1)}
        return {"attn_bias": _joined(tokens, own)}
    if a_row and mask.dtype == torch.bool and _one_is_one(tokens):
        return {"key_padding_mask": ~spread.shard(mask, -1)[:, 0, 0].expand(batch, -1)}
    if keys == 1:
        mask = mask.expand(-1, -1, -1, length)
    if rows not in (1, held):
        mask = spread.shard(mask, -2)
    return {"attn_mask" if mask.dtype == torch.bool else "attn_bias": mask}


def _joined(tokens: Tokens, row: Tensor) -> Tensor:
    """A row of this rank's keys -> of all keys."""
    length = tokens.spread.seq_len
    if length in tokens.shares:  # that rank cannot tell its own row from one of all keys
        return F.pad(row, (0, length - row.shape[-1]))
    return tokens.spread.unshard(row, -1)


def _one_is_one(tokens: Tokens) -> bool:
    """Whether a dim of one is one for all tokens on every rank: on a rank that holds a single
    token it may be of that one. The same on all ranks."""
    return len(tokens.shares) == 1 or 1 not in tokens.shares


def _of_lengths(tokens: Tokens, queries: int, keys: int) -> str:
    told = f", and of others all {sorted(tokens.whole)}" if tokens.whole else ""
    return (
        f"scaled_dot_product_attention has {queries} queries and {keys} keys where a sequence is "
        f"spread, of which this rank holds {tokens.held} of {tokens.spread.seq_len} tokens"
        f"{told}: it is no attention among these tokens. Say which lengths every rank holds whole "
        "(whole=), whose keys may be looked at, or leave the module out of the region"
    )


def _of_order(tokens: Tokens, what: str) -> str:
    return (
        f"{what} in attention of two streams that were cut each by itself, or of one of them: the "
        f"{tokens.held} tokens here are not in the order of all {tokens.spread.seq_len}. A mask "
        "must be one row of this rank's keys"
    )


def _of_mask(tokens: Tokens, mask: Tensor) -> str:
    length = tokens.spread.seq_len
    return (
        f"attn_mask is {tuple(mask.shape)} where this rank holds {tokens.held} of "
        f"{length} tokens: it must hold all {length} keys for these queries, for "
        "all or for one; or be one row of this rank's keys. A square of local tokens says nothing "
        "of the others: make masks before tokens are cut"
    )


def refuse(spread: Spread, refusal: Exception) -> NoReturn:
    """Raise on every rank that comes to this attention, where the ranks meet."""
    refuse_together(spread.mesh, "long_context_attention", spread.validate, refusal)
    raise refusal
