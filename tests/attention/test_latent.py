"""Latents on the wire: the same as attention of the keys and values that they are."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import compiling
import pool as worker
import pytest
import torch
import torch.distributed as dist
from cases import DTYPES, Case, local, shards, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import TOLERANCE, largest
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import usp
from usp.attention.masking import MaskOptions, make_masks
from usp.planning.cost import Place, Shape, bytes_sent
from usp.planning.route import TRANSPORTS
from usp.testing import WireBytes, dense_attention, dropout_multiplier

NAMES = ("dq", "dlatent", "drope_key", "dup_k", "dup_v", "dsinks")


# C and Dr
WIDTH, ROPE = 6, 2
POLICY = CheckpointPolicy.MUST_RECOMPUTE


def given_tensors(case: Case) -> dict[str, Tensor]:
    """The whole problem, the same on every process; q and dout are those of the case."""
    random = torch.Generator().manual_seed(case.seed + 1)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=random, dtype=torch.float64)
        return x.to(DTYPES[case.dtype])

    b, n, h = case.batch, case.num_keys, case.heads
    return {
        "q": whole(case).q,
        "latent": normal(b, n, WIDTH),
        "rope_key": normal(b, n, ROPE),
        "up_k": normal(h, case.head_dim - ROPE, WIDTH),
        "up_v": normal(h, case.value_dim, WIDTH),
    }


def attended(
    case: Case,
    rank: int,
    mesh: Any,
    attend: Any = usp.latent_attention,
    listening: tuple[Any, Any] | None = None,
) -> tuple[list[Tensor], tuple[int, int]]:
    """This rank's out, lse and gradients, and the bytes that it sent in each pass."""
    given, mine = given_tensors(case), local(case, rank)
    own = shards(case, case.seq_len)[rank]
    given |= {"q": mine.q, **{name: given[name][:, own] for name in ("latent", "rope_key")}}
    leaves = [x.clone().requires_grad_() for x in given.values()]
    sinks = None if mine.sinks is None else mine.sinks.clone().requires_grad_()
    forward, backward = listening or (WireBytes(), WireBytes())
    with forward:
        out, lse = attend(
            *leaves,
            mesh,
            causal=case.causal,
            window_size=case.window,
            cu_seqlens=case.cu_seqlens,
            softmax_scale=case.softmax_scale,
            softcap=case.softcap,
            layout=case.placed,
            seq_len=case.seq_len,
            key_padding_mask=mine.padding,
            alibi_slopes=mine.slopes,
            sinks=sinks,
            dropout_p=case.dropout_p,
            dropout_seed=case.dropout_seed,
            transport=case.transport,
            return_lse=True,
            backend=case.backend,
            validate=False,
        )
    with backward:
        leaves += [] if sinks is None else [sinks]
        found = torch.autograd.grad([out, lse], leaves, [mine.dout, mine.dlse])
    sent = (0, 0) if listening else (forward.sent, backward.sent)
    return [out.detach(), lse.detach(), *found], sent


def run(case: Case) -> tuple[list[Tensor], tuple[int, int]]:
    mesh = worker.mesh(case.ulysses, case.ring, case.ring_outer)
    deaf = None if is_heard(case) else (nullcontext(), nullcontext())
    return attended(case, dist.get_rank(), mesh if case.ranks > 1 else None, listening=deaf)


def is_heard(case: Case) -> bool:
    """Whether bytes are counted: under a mode that listens it is the op that runs."""
    return case.seed % 2 == 0


def run_compiled(case: Case) -> tuple[list[Tensor], tuple[int, int]]:
    """In one graph; and once more, with other numbers in it."""
    mesh = worker.mesh(case.ulysses, case.ring, case.ring_outer)
    mesh = mesh if case.ranks > 1 else None
    with compiling.afresh():
        graph = torch.compile(usp.latent_attention, backend="aot_eager", fullgraph=True)
        deaf = nullcontext(), nullcontext()  # no graph is made under a mode
        attended(replace(case, seed=case.seed + 1), dist.get_rank(), mesh, graph, deaf)
        return attended(case, dist.get_rank(), mesh, graph, deaf)


def expected(case: Case) -> list[Tensor]:
    """By dense attention in fp64 over keys and values that are made first."""
    t, leaves = whole(case), [x.double().requires_grad_() for x in given_tensors(case).values()]
    q, latent, rope_key, up_k, up_v = leaves
    nope = torch.einsum("bnc,hdc->bnhd", latent, up_k)
    k = torch.cat((nope, rope_key[:, :, None].expand(-1, -1, case.heads, -1)), -1)
    v, keep = torch.einsum("bnc,hdc->bnhd", latent, up_v), None
    if case.dropout_p:
        shape = case.batch, case.heads, case.seq_len, case.num_keys
        keep = dropout_multiplier(case.dropout_p, case.dropout_seed, *shape)
    sinks = None if t.sinks is None else t.sinks.double().requires_grad_()
    more = {"alibi_slopes": t.slopes, "sinks": sinks, "dropout_keep": keep}
    out, lse = dense_attention(q, k, v, **case.masks, key_padding_mask=t.padding, **more)
    leaves += [] if sinks is None else [sinks]
    found = torch.autograd.grad([out, lse], leaves, [t.dout.double(), t.dlse.double()])
    return [out.detach(), lse.detach(), *found]


def judge(case: Case, pool: Any, run: Any = run) -> None:
    results, sent = zip(*pool.run(run, case, ranks=case.ranks), strict=True)
    if case.ranks > 1 and is_heard(case) and run is not run_compiled:
        assert list(sent) == [by_formula(case, rank) for rank in range(case.ranks)]
    order = torch.tensor([i for row in shards(case, case.seq_len) for i in row])
    for i, reference in enumerate(expected(case)):
        parts = [result[i] for result in results]
        if i < 5:
            dim = 2 if i == 1 else 1
            got = torch.cat(parts, dim).double()
            got = torch.empty_like(got).index_copy_(dim, order, got)
        else:  # each rank's part of the sum
            got = torch.stack([part.double() for part in parts]).sum(0)
        name = ("out", "lse", *NAMES)[i]
        assert got.shape == reference.shape, name
        if i == 1:
            assert torch.equal(got == -torch.inf, reference == -torch.inf)
            got, reference = got.nan_to_num(neginf=0.0), reference.nan_to_num(neginf=0.0)
        if reference.numel():
            error = largest(got - reference) / max(1.0, largest(reference))
            # sums over all rows, of products that may cancel
            allowed = {"dsinks": 30, "dup_k": 6, "dup_v": 6}.get(name, 3) * TOLERANCE[case.dtype]
            assert error <= allowed, f"{name}: {error} {case!r}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    meshes = [
        (1, 1, 1),
        (2, 1, 1),
        (1, 3, 1),
        (2, 2, 1),
        (1, 4, 2),
        (3, 2, 1),
        (1, 6, 3),
        (4, 1, 1),
    ]
    ulysses, ring, outer = draw(st.sampled_from(meshes))
    heads, length = draw(st.integers(1, 5)), draw(st.integers(1, 37))
    bound = st.one_of(st.none(), st.integers(0, 12))
    case = Case(
        ulysses=ulysses,
        ring=ring,
        ring_outer=outer,
        layout=draw(st.sampled_from(["contiguous", "zigzag", "striped"])),
        transport=draw(st.sampled_from([name for name in TRANSPORTS if name != "grid"])),
        backend=draw(st.sampled_from(["auto", "reference"])),
        batch=draw(st.integers(1, 3)),
        seq_len=length,
        heads=heads,
        kv_heads=heads,
        head_dim=draw(st.integers(3, 7)),
        value_dim=draw(st.integers(1, 5)),
        dtype=draw(st.sampled_from(["float64", "float64", "float32", "bfloat16"])),
        causal=draw(st.booleans()),
        window=draw(st.tuples(bound, bound)),
        padding=draw(st.sampled_from([None, 0.3])),
        dropout_p=draw(st.sampled_from([0.0, 0.3])),
        softcap=draw(st.sampled_from([None, 2.0])),
        alibi=draw(st.sampled_from([None, None, "h", "bh"])),
        sinks=draw(st.booleans()),
        return_lse=True,
        seed=draw(st.integers(0, 2**16)),
    )
    if draw(st.integers(0, 3)) == 0:
        cuts = sorted(draw(st.lists(st.integers(0, length), max_size=3)))
        case = replace(case, cu_seqlens=(0, *cuts, length))
    return case


@settings(max_examples=settings.default.max_examples // 4)
@given(case=cases())
def test_latents_give_what_their_keys_and_values_give_and_send_no_more(pool, case: Case) -> None:
    judge(case, pool)


OF_GRAPHS = {"heads": 3, "kv_heads": 3, "head_dim": 5, "value_dim": 4, "return_lse": True}
OF_GRAPHS |= {"seq_len": 13, "batch": 2, "causal": True, "sinks": True}


@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    [
        Case(ulysses=2, ring=2, padding=0.3, alibi="h", dropout_p=0.3, **OF_GRAPHS),
        Case(ulysses=4, window=(5, None), layout="zigzag", **OF_GRAPHS),  # a rank without heads
        Case(ring=3, transport="query_ring", softcap=2.0, layout="striped", **OF_GRAPHS),
    ],
    ids=repr,
)
def test_in_one_graph(pool, case: Case) -> None:
    judge(case, pool, run_compiled)


@pytest.mark.long
def test_an_exported_program_holds_it() -> None:
    case = Case(seq_len=11, heads=3, kv_heads=3, head_dim=5, value_dim=4)
    given = tuple(given_tensors(case).values())

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return usp.latent_attention(*tensors, causal=True)

    program = torch.export.export(Module(), given)
    torch.testing.assert_close(program.module()(*given), Module()(*given))
    targets = [node.target for node in program.graph.nodes]
    assert torch.ops.usp.latent_attention.default in targets


def shape_of(case: Case, width: int | None) -> Shape:
    lengths = case.seq_len, case.seq_len
    dims = case.head_dim, case.value_dim
    return Shape(
        case.batch, *lengths, case.heads, case.heads, *dims, DTYPES[case.dtype],
        case.padding is not None, return_lse=True, latent_width=width,
    )  # fmt: skip


def by_formula(case: Case, rank: int) -> tuple[int, int]:
    options = MaskOptions(case.causal, case.window, case.cu_seqlens)
    (mask,) = (m for _, m, _ in make_masks(options, case.batch))
    degrees, place = (case.ring, case.ulysses), divmod(rank, case.ulysses)
    here = Place(*degrees, *place, case.layout, mask, case.transport, case.ring_outer)
    shape = shape_of(case, WIDTH + ROPE)
    return bytes_sent(shape, here).total, bytes_sent(shape, here, backward=True).total


def test_deepseek_v3_sends_576_numbers_a_token() -> None:
    """128 heads of 192 and 128 are 40,960 numbers; a ring of 8 with 4096 tokens a rank, bf16."""
    shape = Shape(1, 32768, 32768, 128, 128, 192, 128, torch.bfloat16, latent_width=576)
    place = Place(8, 1, 0, 0)
    assert bytes_sent(shape, place).total == 7 * 4096 * 576 * 2
    assert bytes_sent(shape, place, backward=True).total == 7 * 4096 * 576 * (2 + 4)
    keys = replace(shape, latent_width=None)
    assert bytes_sent(keys, place).total == 7 * 4096 * 40960 * 2


def wrong(which: str) -> None:
    case = Case(ring=2, seq_len=8, heads=2, kv_heads=2)
    given = given_tensors(case)
    rank = dist.get_rank()
    for name in ("q", "latent", "rope_key"):
        given[name] = given[name][:, 4 * rank : 4 * rank + 4]
    here = rank == 1 or which.startswith("all")
    options: dict[str, Any] = {}
    if which == "all transport":
        options["transport"] = "pigeon"
    elif here:
        changes: dict[str, Any] = {
            "dims": {"latent": given["latent"][..., None]},
            "tokens": {"rope_key": given["rope_key"][:, :3]},
            "heads": {"up_k": given["up_k"][:1]},
            "width": {"up_v": given["up_v"][..., :5]},
            "head_dim": {"rope_key": given["rope_key"][..., :1]},
            "dtype": {"latent": given["latent"].float()},
            "no tensor": {"up_k": None},
            "another width": {
                "latent": given["latent"][..., :5],
                "up_k": given["up_k"][..., :5],
                "up_v": given["up_v"][..., :5],
            },
        }
        given |= changes[which]
    usp.latent_attention(*given.values(), worker.mesh(1, 2), seq_len=8, **options)


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("dims", ["latent must have 3 dims"]),
        ("tokens", ["tokens differ", "latent has 4", "rope_key has 3"]),
        ("heads", ["heads differ", "q has 2", "up_k has 1"]),
        ("width", ["dims of latents differ", "6", "5"]),
        ("head_dim", ["head_dim of q is 4", "2 + 1"]),
        ("dtype", ["latent must be torch.float64", "torch.float32"]),
        ("no tensor", ["up_k"]),
        ("another width", ["dims of latent and rope_key", "(5, 2)", "(6, 2)"]),
        ("all transport", ["pigeon"]),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(pool, which: str, words: list[str]) -> None:
    for outcome in pool.outcomes(wrong, which, ranks=2):
        assert outcome.kind in ("ValueError", "TypeError"), outcome
        assert all(word in outcome.message for word in words), outcome.message


def test_heads_that_others_hold_and_a_scale_that_is_learned() -> None:
    case = Case(seq_len=11, heads=3, kv_heads=3, head_dim=5, value_dim=4)
    given, scale = given_tensors(case), torch.tensor(0.4, requires_grad=True)
    q, latent, rope_key, up_k, up_v = given.values()
    options: dict[str, Any] = {"causal": True, "dropout_p": 0.4, "dropout_seed": 7}
    whole_out = usp.latent_attention(*given.values(), softmax_scale=0.4, **options)
    some = q[:, :, 1:], latent, rope_key, up_k[1:], up_v[1:]
    out = usp.latent_attention(*some, softmax_scale=scale, heads=(1, 3), **options)
    torch.testing.assert_close(out, whole_out[:, :, 1:])
    (grad,) = torch.autograd.grad(out.sin().sum(), scale)
    sums = []
    for value in (0.4 - 1e-5, 0.4 + 1e-5):
        moved = usp.latent_attention(*some, softmax_scale=value, heads=(1, 3), **options)
        sums.append(moved.sin().sum())
    torch.testing.assert_close(grad.double(), (sums[1] - sums[0]) / 2e-5, rtol=1e-5, atol=1e-7)


def test_a_selective_checkpoint_computes_latents_again() -> None:
    random = torch.Generator().manual_seed(3)
    shapes = (1, 5, 2, 4), (1, 5, 7), (1, 5, 2), (2, 2, 7), (2, 3, 7)
    given = [torch.randn(shape, generator=random).requires_grad_() for shape in shapes]
    policy = partial(create_selective_checkpoint_contexts, lambda *_, **__: POLICY)
    plain = usp.latent_attention(*given).sin().sum()
    again = checkpoint(usp.latent_attention, *given, use_reentrant=False, context_fn=policy)
    wanted, found = (torch.autograd.grad(x, given) for x in (plain, again.sin().sum()))
    assert all(map(torch.equal, found, wanted))


def test_the_projection_of_a_model_is_its_heads() -> None:
    """One device: DeepSeek's kv_b_proj as it stands in a checkpoint, and autocast."""
    torch.manual_seed(0)
    heads, nope, rope, value, width = 3, 4, 2, 5, 7
    proj = torch.nn.Linear(width, heads * (nope + value), bias=False)
    q, latent = torch.randn(2, 11, heads, nope + rope), torch.randn(2, 11, width)
    rope_key = torch.randn(2, 11, rope)
    k_nope, v = proj(latent).view(2, 11, heads, -1).split((nope, value), -1)
    k = torch.cat((k_nope, rope_key[:, :, None].expand(-1, -1, heads, -1)), -1)
    theirs = usp.long_context_attention(q, k, v, causal=True)
    (grad,) = torch.autograd.grad(theirs.square().sum(), [proj.weight])
    up = proj.weight.view(heads, -1, width).split((nope, value), 1)
    ours = usp.latent_attention(q, latent, rope_key, *up, causal=True)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), [proj.weight])[0], grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert usp.latent_attention(q, latent, rope_key, *up).dtype == torch.bfloat16
    with pytest.raises(NotImplementedError, match="second derivative"):
        x = q.clone().requires_grad_()
        out = usp.latent_attention(x, latent, rope_key, *(w.detach() for w in up))
        (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        g.sum().backward()
