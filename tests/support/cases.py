"""One distributed attention problem as plain data, and what each rank holds of it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from random import Random
from typing import Any

import torch
from mask_cases import Sees, any_mask, table_of
from torch import Tensor

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, repr=False)
class Case:
    """A problem on a mesh. Everything random in it comes from ``seed``.

    Attributes:
        on_mesh: With one rank: whether to pass a mesh of size 1 rather than None.
        ring_outer: Nodes of a double ring.
        layout: A layout's name, "documents" for DocumentZigzag of ``cu_seqlens``, or "held" for
            Held of ``counts``.
        key_layout: Another one of the keys, or None; Held of ``key_counts``.
        key_len: Another number of keys than ``seq_len`` (cross-attention), or None.
        padding: Share of the keys that the padding mask ignores; None for no mask.
        bias: Letters of the dims in which the bias is not broadcast, out of "bhq"; None for none.
        alibi: "h" or "bh", the dims of the slopes.
        bias_hides: Share of the bias that is -inf.
        bias_fill: Added to some of its rows, and of its first and other columns: a number, or
            "lowest" for that of its dtype.
        bias_dtype: Another dtype of the bias than ``dtype``.
        strided: How q, k, v and the bias lie in memory: "heads" before tokens, or with the "last"
            dim not contiguous.
        magnitude: Factor of q: large ones make one key win.
        special: What is awkward about the values; see ``_make_special``.
        unions: A drawn mask beside the options: "one" for all samples, one for "each", or a
            boolean "table" in torch's meaning.
        key_lengths: Whether each sample has a number of keys of its own.
        query_offset: Position of the first query among the keys; -1 draws one for each sample.
        replicated: "queries" or "keys" that every rank holds whole; None for neither.
        chunks, head_chunks, offload: As in the call.
    """

    ulysses: int = 1
    ring: int = 1
    ring_outer: int = 1
    on_mesh: bool = True
    layout: str = "contiguous"
    transport: str = "ring"
    backend: str = "auto"
    batch: int = 1
    seq_len: int = 8
    key_len: int | None = None
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 4
    value_dim: int = 4
    dtype: str = "float64"
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    cu_seqlens: tuple[int, ...] | None = None
    counts: tuple[int, ...] = ()
    key_layout: str | None = None
    key_counts: tuple[int, ...] = ()
    prefix_len: int | None = None
    softmax_scale: float | None = None
    padding: float | None = None
    bias: str | None = None
    bias_hides: float = 0.0
    bias_fill: float | str | None = None
    bias_dtype: str | None = None
    softcap: float | None = None
    alibi: str | None = None
    dropout_p: float = 0.0
    return_lse: bool = False
    strided: str | None = None
    magnitude: float = 1.0
    special: str | None = None
    unions: str | None = None
    key_lengths: bool = False
    query_offset: int | None = None
    sinks: bool = False
    replicated: str | None = None
    chunks: int = 1
    head_chunks: int = 1
    offload: str | None = None
    seed: int = 0

    def __repr__(self) -> str:
        changed = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        )
        return f"Case({', '.join(changed)})"

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring

    @property
    def num_keys(self) -> int:
        return self.seq_len if self.key_len is None else self.key_len

    @property
    def placed(self) -> Any:
        """The layout as usp takes it."""
        of_queries = _placed(self.layout, self.counts, self.cu_seqlens)
        if self.key_layout is None:
            return of_queries
        return of_queries, _placed(self.key_layout, self.key_counts, self.cu_seqlens)

    @property
    def dropout_seed(self) -> int:
        """63 bits, none of them always 0."""
        return (self.seed + 1) * 0x9E3779B97F4A7C15 % 2**63

    @property
    def masks(self) -> dict[str, Any]:
        """The options that say who sees whom, and the scale: ours and the oracle's alike."""
        return {
            "causal": self.causal,
            "window_size": self.window,
            "cu_seqlens": self.cu_seqlens,
            "prefix_len": self.prefix_len,
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
        }


def _placed(layout: str, counts: tuple[int, ...], cu_seqlens: tuple[int, ...] | None) -> Any:
    import usp

    if layout == "held":
        return usp.Held(counts)
    return usp.DocumentZigzag(cu_seqlens) if layout == "documents" else layout


@dataclass
class Tensors:
    """Inputs and cotangents, of the whole sequence or of one rank."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    bias: Tensor | None
    padding: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None = None
    queries: list[int] | None = None  # their positions; None for all


@dataclass
class Seen:
    """Who sees whom beyond the plain options.

    Attributes:
        given: What the function under test is given.
        query_offset: (B,) int64.
        sees: Of each sample, whether a query sees a key; None where all is plain.
        key_lengths: (B,) int64, or None.
    """

    given: dict[str, Any]
    query_offset: Tensor
    sees: list[Sees] | None
    key_lengths: Tensor | None

    def table(self, query_len: int, key_len: int) -> Tensor | None:
        """(B, Sq, Sk) bool, pair by pair, for the oracle; None where all is plain."""
        if self.sees is None and self.key_lengths is None:
            return None
        table = torch.ones(len(self.query_offset), query_len, key_len, dtype=torch.bool)
        if self.sees is not None:
            of = {sees: table_of(sees, query_len, key_len) for sees in set(self.sees)}
            table &= torch.stack([of[sees] for sees in self.sees]) if self.sees else table
        if self.key_lengths is not None:
            table &= torch.arange(key_len) < self.key_lengths[:, None, None]
        return table


def seen(case: Case) -> Seen:
    """The drawn masks, lengths and offsets, the same on every process."""
    random, b, shape = Random(case.seed), case.batch, (case.seq_len, case.num_keys)
    given: dict[str, Any] = {}
    offset, all_see, key_lengths = torch.zeros(b, dtype=torch.int64), None, None
    if case.query_offset is not None:
        values = [case.query_offset] * b
        if case.query_offset == -1:
            values = [random.choice([-3, 0, 2, 5]) for _ in range(b)]
        given["query_offset"] = case.query_offset if case.query_offset != -1 else values
        offset = torch.tensor(values, dtype=torch.int64)
    if case.unions is not None:
        assert case.query_offset is None, "drawn masks fit whole lengths alone"
        choice = [any_mask(random, *shape) for _ in range(2)]
        which = [random.randrange(2) for _ in range(b)] if case.unions == "each" else [0] * b
        masks, all_see = [choice[each][0] for each in which], [choice[each][1] for each in which]
        if case.unions == "table":
            given["attn_mask"] = choice[0][0].dense(*shape)
        else:
            given["mask"] = masks if case.unions == "each" else choice[0][0]
    if case.key_lengths:
        given["key_lengths"] = [random.randint(0, case.num_keys) for _ in range(b)]
        key_lengths = torch.tensor(given["key_lengths"], dtype=torch.int64)
    return Seen(given, offset, all_see, key_lengths)


def whole(case: Case) -> Tensors:
    """The whole problem, the same on every process."""
    random = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    b, sq, sk, h = case.batch, case.seq_len, case.num_keys, case.heads

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    bias = padding = slopes = None
    q, k = normal(b, sq, h, case.head_dim), normal(b, sk, case.kv_heads, case.head_dim)
    v = normal(b, sk, case.kv_heads, case.value_dim)
    dout, dlse = normal(b, sq, h, case.value_dim), normal(b, h, sq, dtype=state_dtype)
    if case.bias is not None:
        sizes = zip("bhq", (b, h, sq), strict=True)
        shape = (*(size if dim in case.bias else 1 for dim, size in sizes), sk)
        bias = normal(*shape, dtype=DTYPES[case.bias_dtype or case.dtype])
        hidden = torch.rand(shape, generator=random) < case.bias_hides
        bias = _filled(bias, case.bias_fill, random).masked_fill(hidden, -torch.inf)
    if case.padding is not None:
        padding = torch.rand(b, sk, generator=random) < case.padding
    if case.alibi is not None:
        shape = (b, h) if case.alibi == "bh" else (h,)
        slopes = torch.rand(shape, generator=random, dtype=state_dtype)
    t = Tensors((q * case.magnitude).to(dtype), k, v, dout, dlse, bias, padding, slopes)
    if case.special is not None:
        _make_special(t, case.special)
    if case.sinks:
        t.sinks = normal(h)
    return t


def _make_special(t: Tensors, special: str) -> None:
    """Values that a merge of blocks must survive."""
    half = t.k.shape[1] // 2
    if special == "zero channel":
        t.v[..., 1] = 0.0
    elif special == "opposite blocks":
        t.k[:, half : 2 * half], t.v[:, half : 2 * half] = t.k[:, :half], -t.v[:, :half]
    elif special == "far apart":  # lse of the second half of the keys is some 20000 less
        t.k[..., 0], t.q[..., 0] = 0.0, 200.0
        t.k[:, half:, :, 0] = -200.0
    elif special == "first half padded":
        assert t.padding is not None
        t.padding[:, :half] = True
    elif special == "offset":  # of all scores, by 1e5
        t.q[..., 0] = t.k[..., 0] = (1e5 * t.q.shape[-1] ** 0.5) ** 0.5
    else:
        raise ValueError(special)


def _filled(bias: Tensor, fill: float | str | None, random: torch.Generator) -> Tensor:
    """Masks of finite values: rows that all share one, and the padding of a sequence's start."""
    if fill is None:
        return bias
    ends = torch.finfo(bias.dtype)
    value = ends.min if fill == "lowest" else min(max(float(fill), ends.min / 2), ends.max / 2)
    rows = torch.rand((*bias.shape[:3], 1), generator=random) < 0.3
    first = torch.rand(bias.shape[:2], generator=random)[..., None, None] * bias.shape[3]
    columns = torch.rand((1, 1, 1, bias.shape[3]), generator=random) < 0.1
    columns = columns | (torch.arange(bias.shape[3]) < first)
    return torch.where(rows | columns, bias + value, bias)


def chunks(length: int, parts: int) -> list[list[int]]:
    """0..length-1 in consecutive parts, the first ones longer."""
    small, longer = divmod(length, parts)
    ends = [0]
    for i in range(parts):
        ends.append(ends[-1] + small + (i < longer))
    return [list(range(a, b)) for a, b in pairwise(ends)]


def ring_rows(
    layout: str, length: int, ring: int, cu_seqlens: tuple[int, ...] | None = None
) -> list[list[int]]:
    """Positions of each ring rank, written down independently of usp.planning.layout."""
    if layout == "contiguous":
        return chunks(length, ring)
    if layout == "striped":
        return [list(range(r, length, ring)) for r in range(ring)]
    if layout == "zigzag":
        parts = chunks(length, 2 * ring)
        return [parts[r] + parts[2 * ring - 1 - r] for r in range(ring)]
    assert layout == "documents" and cu_seqlens is not None
    rows: list[list[int]] = [[] for _ in range(ring)]
    for document, start in enumerate(cu_seqlens[:-1]):
        inside = ring_rows("zigzag", cu_seqlens[document + 1] - start, ring)
        for r in range(ring):
            rows[r] += [start + i for i in inside[(r + document) % ring]]
    return rows


def shards(case: Case, length: int) -> list[list[int]]:
    """Positions of the queries of each rank of the mesh."""
    if case.replicated == "queries":
        return [list(range(length))] * case.ranks
    if case.layout == "held":
        ends = pairwise(accumulate(case.counts, initial=0))
        return [list(range(start, stop)) for start, stop in ends]
    rows = ring_rows(case.layout, length, case.ring, case.cu_seqlens)
    return [[row[i] for i in piece] for row in rows for piece in chunks(len(row), case.ulysses)]


def key_shards(case: Case) -> list[list[int]]:
    """The same of the keys."""
    if case.replicated == "keys":
        return [list(range(case.num_keys))] * case.ranks
    case = replace(case, replicated=None)
    if case.key_layout is not None:
        case = replace(case, layout=case.key_layout, counts=case.key_counts)
    return shards(case, case.num_keys)


def local(case: Case, rank: int) -> Tensors:
    """What one rank holds of the problem."""
    t = whole(case)
    queries, keys = shards(case, case.seq_len)[rank], key_shards(case)[rank]
    bias = t.bias
    if bias is not None and "q" in case.bias:
        bias = bias[:, :, queries]
    if case.replicated == "queries":  # each copy of the results gets its part of their gradient
        others = torch.arange(case.seq_len) % case.ranks != rank
        t.dout[:, others], t.dlse[:, :, others] = 0.0, 0.0
    return Tensors(
        t.q[:, queries],
        t.k[:, keys],
        t.v[:, keys],
        t.dout[:, queries],
        t.dlse[:, :, queries],
        bias,
        None if t.padding is None else t.padding[:, keys],
        t.slopes,
        t.sinks,
        queries,
    )
