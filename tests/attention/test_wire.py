"""Bytes that leave each rank equal the formula exactly: no padding, nothing sent twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pool as worker
import pytest
import torch
import torch.distributed as dist
from cases import DTYPES, Case, chunks, local, ring_rows, seen, shards
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_cases import chunks as chunked
from mesh_cases import held
from torch import Tensor

import usp
from usp import masks
from usp.attention.masking import MaskOptions, make_masks
from usp.masks import Mask
from usp.planning.cost import Bias, Place, Shape, bias_held, bytes_sent
from usp.planning.layout import Replicated
from usp.planning.route import TRANSPORTS
from usp.testing import WireBytes


def counted(case: Case) -> tuple[int, int, int]:
    """Bytes sent in one forward and in its backward, and those of the bias kept between them."""
    mesh = worker.mesh(case.ulysses, case.ring, case.ring_outer)
    t = local(case, dist.get_rank())
    leaves = [x.requires_grad_() for x in (t.q, t.k, t.v)]
    if t.bias is not None and case.seed % 2:
        leaves.append(t.bias.requires_grad_())

    def attend() -> Any:
        return usp.long_context_attention(
            *leaves[:3],
            mesh,
            **case.masks,
            **seen(case).given,
            layout=case.placed,
            seq_len=(case.seq_len, case.num_keys),
            key_padding_mask=t.padding,
            attn_bias=t.bias,
            alibi_slopes=t.slopes,
            dropout_p=case.dropout_p,
            dropout_seed=1,
            transport=case.transport,
            return_lse=case.return_lse,
            backend="reference",
            chunks=case.chunks,
            head_chunks=case.head_chunks,
            offload=case.offload,
            validate=False,
            **placement(case),
        )

    with WireBytes() as forward:
        result = attend()
    outputs = list(result) if case.return_lse else [result]
    cotangents = [t.dout, t.dlse][: len(outputs)]
    with WireBytes() as backward:
        torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
    unheard = attend()
    saved = (unheard[0] if case.return_lse else unheard).grad_fn.saved_tensors
    kept = 0
    if t.bias is not None:
        kept = saved[
            4 if (case.chunks, case.head_chunks, case.offload) == (1, 1, None) else 1
        ].nbytes
    return forward.sent, backward.sent, kept


def placement(case: Case) -> dict[str, str]:
    return {} if case.replicated is None else {case.replicated: "replicated"}


def masks_of_each(case: Case) -> list[Mask]:
    """The mask of each sample, as the call makes them."""
    options = MaskOptions(
        case.causal, case.window, case.cu_seqlens, case.prefix_len, **seen(case).given
    )
    each: list[Mask] = [masks.everything()] * case.batch
    for samples, mask, _ in make_masks(options, case.batch):
        for i in range(case.batch)[samples.start : samples.stop]:
            each[i] = mask
    return each


def by_formula(case: Case, rank: int) -> tuple[int, int, int]:
    """What usp.planning.cost says, which `usp plan` and the demo print."""
    shape = Shape(
        batch=case.batch,
        query_len=case.seq_len,
        key_len=case.num_keys,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        value_head_dim=case.value_dim,
        dtype=DTYPES[case.dtype],
        key_padding_mask=case.padding is not None,
        return_lse=case.return_lse,
        bias=None if case.bias is None else Bias(case.bias, DTYPES[case.dtype], case.seed % 2 > 0),
    )
    layouts = case.placed if isinstance(case.placed, tuple) else (case.placed,) * 2
    if case.replicated == "queries":
        layouts = Replicated(case.seq_len), layouts[1]
    elif case.replicated == "keys":
        layouts = layouts[0], Replicated(case.num_keys)
    place = Place(
        ring_degree=case.ring,
        ulysses_degree=case.ulysses,
        ring_rank=rank // case.ulysses,
        ulysses_rank=rank % case.ulysses,
        layout=layouts,
        mask=masks_of_each(case),
        transport=case.transport,
        ring_outer_degree=case.ring_outer,
    )
    sent = (bytes_sent(shape, place, backward).total for backward in (False, True))
    held, gradient = bias_held(shape, place)
    wide = 8 if case.dtype == "float64" else 4
    assert gradient == (held // DTYPES[case.dtype].itemsize * wide if case.seed % 2 else 0)
    return *sent, held


def by_hand(case: Case, rank: int) -> tuple[int, int, int]:
    """The same for full attention by ring and all-gather, from first principles.

    Rank i owns n_i tokens and H_i heads: ``b n_i (H - H_i) d e`` for q and ``b (N - n_i) H_i d e``
    for out along its row; each hop of the ring a block of K and V; fp32 gradients behind them.
    """
    r, u = divmod(rank, case.ulysses)
    e = DTYPES[case.dtype].itemsize
    wide = 8 if case.dtype == "float64" else 4
    rows = [len(row) for row in ring_rows(case.layout, case.seq_len, case.ring)]
    n = [len(piece) for piece in chunks(rows[r], case.ulysses)]
    heads = [len(piece) for piece in chunks(case.heads, case.ulysses)]
    others = case.heads - heads[u]
    width = case.head_dim + case.value_dim
    # heads == kv_heads here: q, k, v go out by heads, out comes back by tokens
    q_k_v = n[u] * others * (case.head_dim + width) * e
    out = (rows[r] - n[u]) * heads[u] * case.value_dim * e
    block = heads[u] * width * e
    # to both sides, half of the other ranks each; gradients from where a block has come on and home
    sides = [(case.ring // 2, 1), ((case.ring - 1) // 2, -1)]
    passed = sum(rows[(r - by * i) % case.ring] for hops, by in sides for i in range(hops))
    came = sum(rows[(r - by * i) % case.ring] for hops, by in sides for i in range(1, hops + 1))
    forward = q_k_v + out + passed * block
    # mirrored: dout goes out, dq, dk, dv come back
    exchange = n[u] * others * case.value_dim * e
    exchange += (rows[r] - n[u]) * heads[u] * (case.head_dim + width) * e
    backward = exchange + passed * block + came * heads[u] * width * wide
    return case.batch * forward, case.batch * backward, 0


UNEVEN = [
    Case(ulysses=4, seq_len=13, heads=6, kv_heads=6, head_dim=5, value_dim=3, dtype="float32"),
    Case(ring=4, seq_len=13, heads=3, kv_heads=3, dtype="bfloat16", batch=2),
    Case(ulysses=2, ring=2, seq_len=17, heads=5, kv_heads=5, layout="zigzag", dtype="float32"),
    Case(ulysses=2, ring=3, seq_len=5, heads=1, kv_heads=1, layout="striped", dtype="float64"),
    Case(ulysses=3, ring=2, seq_len=16, heads=2, kv_heads=2, value_dim=7, dtype="float16"),
    Case(ulysses=6, seq_len=4, heads=7, kv_heads=7, dtype="float32"),
]


@pytest.mark.parametrize("case", UNEVEN, ids=repr)
def test_bytes_counted_by_hand(pool, case: Case) -> None:
    assert pool.run(counted, case, ranks=case.ranks) == [
        by_hand(case, rank) for rank in range(case.ranks)
    ]


def test_the_textbook_formula_where_everything_divides(pool) -> None:
    """U x R, H = G, bytes of one rank: 4 b N h e / P (U-1)/U + 2 b N h e / U (R-1)/R forward.

    The backward adds fp32 dK, dV, which travel as many hops: 8 b N h / U (R-1)/R.
    """
    case = Case(ulysses=2, ring=3, seq_len=24, heads=4, kv_heads=4, batch=2, dtype="float32")
    n_h_e = case.batch * case.seq_len * case.heads * case.head_dim * 4
    exchange = 4 * n_h_e // 6 // 2
    blocks = 2 * n_h_e // 2 * 2 // 3
    gradients = 2 * n_h_e // 2 * 2 // 3
    expected = exchange + blocks, exchange + blocks + gradients, 0
    assert pool.run(counted, case, ranks=6) == [expected] * 6


@st.composite
def cases(draw: st.DrawFn) -> Case:
    meshes = [(2, 1), (1, 2), (2, 2), (1, 4), (4, 1), (3, 2), (2, 3), (1, 3), (5, 1), (1, 6)]
    ulysses, ring = draw(st.sampled_from(meshes))
    kv_heads, group_size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    seq_len = draw(st.integers(1, 29))
    bound = st.one_of(st.none(), st.integers(0, 12))
    case = Case(
        ulysses=ulysses,
        ring=ring,
        ring_outer=draw(st.sampled_from([n for n in (1, 2) if ring % n == 0])),
        layout=draw(st.sampled_from(["contiguous", "zigzag", "striped", "documents", "held"])),
        transport=draw(st.sampled_from(TRANSPORTS)),
        batch=draw(st.integers(1, 3)),
        seq_len=seq_len,
        heads=kv_heads * group_size,
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 5)),
        value_dim=draw(st.integers(1, 5)),
        dtype=draw(st.sampled_from(["float64", "float32", "bfloat16"])),
        causal=draw(st.booleans()),
        window=draw(st.tuples(bound, bound)),
        padding=draw(st.sampled_from([None, 0.3])),
        return_lse=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.2])),
        bias=draw(st.sampled_from([None, "", "h", "q", "hq", "bq", "bhq"])),
        unions=draw(st.sampled_from([None, None, "one", "each"])),
        key_lengths=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )
    if case.layout == "documents" or draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, seq_len), max_size=3)))
        case = Case(**{**vars(case), "cu_seqlens": (0, *cuts, seq_len)})
    if case.layout == "held":
        case = replace(case, counts=draw(held(seq_len, case.ranks)))
    if draw(st.integers(0, 3)) == 0:
        case = replace(case, key_layout="held", key_counts=draw(held(case.num_keys, case.ranks)))
    counts = [len(shard) for shard in shards(case, seq_len)]
    lengths = [set(counts[r * ulysses : (r + 1) * ulysses]) for r in range(ring)]
    # a row with one query somewhere and more elsewhere asks first, which no formula counts
    asks = any(1 in row and len(row) > 1 for row in lengths)
    if case.transport == "grid" and not 1 < case.ring_outer < case.ring:
        case = replace(case, transport="auto")
    asks = asks or case.transport in ("queries", "query_ring", "grid")  # which moves none
    case = replace(case, replicated=draw(st.sampled_from([None] * 6 + ["queries", "keys"])))
    if case.replicated != "queries" and case.transport in ("ring", "direct", "allgather"):
        case = replace(case, **draw(chunked()))  # which do not change a byte
    return replace(case, bias=None) if asks or case.replicated == "queries" else case


@settings(max_examples=settings.default.max_examples)
@given(case=cases())
def test_bytes_equal_the_formula(pool, case: Case) -> None:
    assert pool.run(counted, case, ranks=case.ranks) == [
        by_formula(case, rank) for rank in range(case.ranks)
    ]


def on_one_rank(case: Case, on_mesh: bool) -> tuple[int, dict[str, int]]:
    mesh = worker.mesh(1, 1) if on_mesh else None
    t = local(case, 0)
    leaves = [x.requires_grad_() for x in (t.q, t.k, t.v)]
    with WireBytes() as wire:
        out = usp.long_context_attention(*leaves, mesh, causal=True)
        torch.autograd.grad(out, leaves, t.dout)
        module = usp.LongContextAttention(mesh, causal=True, validate="always")
        torch.autograd.grad(module(*leaves), leaves, t.dout)
        x = usp.shard_sequence(t.q, mesh, 1)
        usp.unshard_sequence(x, mesh, 1)
    return wire.sent, dict(wire.calls)


@pytest.mark.parametrize("on_mesh", [True, False])
def test_one_rank_sends_nothing(pool, on_mesh: bool) -> None:
    """Not even an empty message."""
    assert pool.run(on_one_rank, Case(seq_len=7), on_mesh, ranks=1) == [(0, {})]


def bytes_of_meeting(options: dict) -> list[int]:
    """What ranks send to compare, beside what they send anyway."""
    mesh, sent = worker.mesh(2, 2), []
    x = torch.zeros(1, 3, 2, 4, requires_grad=True)
    named = {"seq_len": 12}  # what is not named is asked for, whatever is compared
    for validate, more in ((False, named), (options.pop("validate"), {})):
        with WireBytes() as joined:
            usp.unshard_sequence(x, mesh, 1, validate=validate is not False, **more)
        with WireBytes() as forward:
            out = usp.long_context_attention(
                x, x, x, mesh, validate=validate, **{**options, **more}
            )
        with WireBytes() as backward:
            out.sum().backward()
        sent.append([joined.sent, forward.sent, backward.sent])
    return [b - a for a, b in zip(*sent, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {"validate": None},
        {"validate": True, "seq_len": 12, "causal": True},
        {"validate": None, "dropout_p": 0.5, "transport": "allgather"},
    ],
    ids=str,
)
def test_meeting_costs_six_numbers_along_each_axis(pool, options: dict) -> None:
    """48 bytes to the other rank of the row, then those of the row to the other row."""
    assert pool.run(bytes_of_meeting, options, ranks=4) == [[48 + 96] * 3] * 4


def bias_bytes(shape: tuple[int, ...], lengths: list[int]) -> int:
    """Forward bytes of a bias alone, on a row of ranks."""
    mesh = worker.mesh(len(lengths), 1)
    rank = dist.get_rank()
    q = torch.zeros(1, lengths[rank], 4, 2)
    rows = lengths[rank] if shape[2] > 1 else 1
    bias: Tensor = torch.zeros(shape[0], shape[1], rows, sum(lengths))
    sent = []
    for extra in ({}, {"attn_bias": bias}):
        with WireBytes() as wire:
            usp.long_context_attention(q, q, q, mesh, seq_len=sum(lengths), validate=False, **extra)
        sent.append(wire.sent)
    return sent[1] - sent[0]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 1, 1, 10), [0, 0, 0]),  # the same for all: everyone has it
        ((1, 4, 1, 10), [0, 0, 0]),
        # rows for their heads: 4 heads dealt 2, 1, 1, rows 4, 3, 3, keys 10, fp32
        ((1, 4, 10, 10), [4 * 10 * 4 * 2, 3 * 10 * 4 * 3, 3 * 10 * 4 * 3]),
        ((1, 1, 10, 10), [4 * 10 * 4 * 2, 3 * 10 * 4 * 2, 3 * 10 * 4 * 2]),
    ],
    ids=str,
)
def test_a_bias_sends_only_rows_that_others_need(
    pool, shape: tuple[int, ...], expected: list[int]
) -> None:
    assert pool.run(bias_bytes, shape, [4, 3, 3], ranks=3) == expected


def test_queries_on_every_rank_cost_one_all_reduce(pool) -> None:
    """64 latents over any number of keys: 16 are merged here, out in bf16 and the LSE handed out;
    backward, their gradients are added up likewise, and nothing else leaves a rank."""
    case = Case(ring=4, seq_len=64, key_len=512, heads=2, kv_heads=2, head_dim=16, value_dim=16)
    case = replace(case, replicated="queries", dtype="bfloat16")
    sent = {(forward, backward) for forward, backward, _ in pool.run(counted, case, ranks=4)}
    forward = 48 * 2 * (16 * 4 + 4) + 16 * 3 * 2 * (16 * 2 + 4)
    assert sent == {(forward, 48 * 2 * 16 * 2 + 16 * 3 * 2 * 16 * 2)}


def test_few_queries_over_many_keys_move_and_not_the_keys(pool) -> None:
    """64 latents: their queries and what was found for them, whatever the number of keys is."""
    case = Case(ring=4, seq_len=8, key_len=4096, heads=2, kv_heads=2, head_dim=16, value_dim=16)
    case = replace(case, transport="auto", dtype="float32")
    sent = [forward for forward, _, _ in pool.run(counted, case, ranks=4)]
    # to three ranks 2 queries of 2 x 16 numbers, and back to them out and lse
    assert sent == [3 * 2 * 2 * (16 + 16 + 1) * 4] * 4
