"""Attention in chunks: what waits elsewhere comes back right, and memory is what the formula says.

That results and bytes on the wire do not depend on chunks is drawn in test_property and test_wire.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import compiling
import judge as judging
import pool as worker
import pytest
import torch
import torch.utils.checkpoint
from cases import Case
from elsewhere import elsewhere
from hypothesis import given, note, settings
from hypothesis import strategies as st
from judge import judge
from mesh_cases import QUERIES_MOVE, cases, chunks
from torch import Tensor

import usp
from usp.planning.chunks import make_chunks
from usp.planning.masks.options import make_mask
from usp.planning.plan import make_plan
from usp.planning.samples import masks_of
from usp.testing import StorageBytes


def run_early(case: Case) -> dict[str, Tensor]:
    with elsewhere():
        return judging.run(case)


def run_late(case: Case) -> dict[str, Tensor]:
    with elsewhere(is_late=True):
        return judging.run(case)


@st.composite
def offloaded(draw: st.DrawFn) -> Case:
    case = draw(
        cases().filter(lambda c: c.replicated != "queries" and c.transport not in QUERIES_MOVE)
    )
    return replace(case, **{**draw(chunks()), "offload": "cpu"})


@settings(max_examples=settings.default.max_examples // 6)
@given(case=offloaded(), is_late=st.booleans())
def test_what_waits_elsewhere_comes_back(pool, case: Case, is_late: bool) -> None:
    """However early or late copies are made beside the current stream."""
    note(f"late: {is_late}")
    judge(case, pool, run_late if is_late else run_early)


# (B, S, H, G, D) in bf16
WHOLE = 1, 256, 4, 2, 16


def measured(ulysses: int, ring: int, chunks: int, options: dict) -> tuple[int, int]:
    """Peaks of a forward and of its backward, when all is planned."""
    batch, length, heads, kv_heads, dim = WHOLE
    mesh, tokens = worker.mesh(ulysses, ring), length // ulysses // ring
    q, k, v, dout = (
        torch.randn(batch, tokens, n, dim).bfloat16() for n in (heads, kv_heads, kv_heads, heads)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def attend() -> Tensor:
        return usp.long_context_attention(
            *leaves, mesh, chunks=chunks, seq_len=length, backend="native", **options
        )

    found = []
    with elsewhere() if options["offload"] else nullcontext():
        torch.autograd.grad(attend(), leaves, dout)
        for _ in range(3):
            with StorageBytes() as forward:
                out = attend()
            with StorageBytes() as backward:
                torch.autograd.grad(out, leaves, dout)
            found.append((forward.peak, backward.peak))
            del out
    return min(peak for peak, _ in found), min(peak for _, peak in found)


def least(
    pool, calls: list[tuple], holds: Callable[..., bool], ranks: int
) -> list[list[tuple[int, int]]]:
    """Peaks of calls of ``measured``, of each rank. A thread of gloo may hold a message for a while
    where others use the machine, so the least count, of as many runs as it takes."""
    found: list[list[tuple[int, int]]] = []
    for _ in range(12):
        again = [pool.run(measured, *call, ranks=ranks) for call in calls]
        found = found or again
        for of_ranks, more in zip(found, again, strict=True):
            of_ranks[:] = [
                (min(a[0], b[0]), min(a[1], b[1])) for a, b in zip(of_ranks, more, strict=True)
            ]
        if holds(*found):
            break
    return found


def formula(ulysses: int, ring: int, chunks: int) -> tuple[int, int]:
    """Of docs/offload.md, with offload."""
    _, length, heads, kv_heads, dim = WHOLE
    tokens = length // ulysses // ring
    dq = tokens * heads * dim * 2  # and out, as large
    dkv = tokens * kv_heads * 2 * dim * 2
    rows = tokens * ulysses // chunks * heads // ulysses  # a row of a head each
    q = out = rows * dim * 2
    lse, wide = rows * 4, rows * dim * 4
    kv = tokens * ulysses // chunks * (kv_heads // ulysses) * 2 * dim * 2
    sums = 2 * kv
    if ulysses == 1:  # q and dout are where they were
        forward = dq + wide + 2 * (out + lse) + 2 * kv
        turn, home = 0, 0
    else:
        forward = dq + wide + max(2 * (q + out + lse) + 2 * kv, q + out + lse + 4 * kv)
        turn, home = out, 2 * kv
    turn += dq + 2 * (q + out + lse) + 2 * (kv + sums) + wide + q + lse
    home += dq + dkv + 2 * (kv + sums) + kv
    return forward, max(turn, home)


@pytest.mark.parametrize("chunks", [4, 8])
@pytest.mark.parametrize("ulysses", [1, 2])
def test_memory_is_that_of_the_formula(pool, ulysses: int, chunks: int) -> None:
    """Byte for byte: two of what waits, one of what is computed, and the results."""
    options = {"offload": "cpu"}
    wanted = [formula(ulysses, 1, chunks)] * ulysses
    call = ulysses, 1, chunks, options
    assert least(pool, [call], lambda found: found == wanted, ulysses) == [wanted]


def test_memory_beside_the_results_is_that_of_a_chunk(pool) -> None:
    """Half of it with twice as many chunks, along a ring too."""
    ulysses, ring = 2, 2
    options = {"offload": "cpu", "layout": "zigzag", "causal": True}
    _, length, heads, kv_heads, dim = WHOLE
    out = length // ulysses // ring * heads * dim * 2
    results = out, out + out * 2 * kv_heads // heads

    def beside(of_ranks: list[tuple[int, int]]) -> list[list[int]]:
        pairs = (zip(peaks, results, strict=True) for peaks in of_ranks)
        return [[peak - result for peak, result in pair] for pair in pairs]

    def twice(of_ranks: list[tuple[int, int]]) -> list[list[int]]:
        return [[2 * size for size in sizes] for sizes in beside(of_ranks)]

    calls = [(ulysses, ring, chunks, options) for chunks in (4, 8)]
    few, many = least(pool, calls, lambda a, b: beside(a) == twice(b), ulysses * ring)
    assert beside(few) == twice(many)


def test_nothing_waits_where_nobody_looks_again(pool) -> None:
    """Without offload: the state of one chunk beside what plain attention holds, too."""
    _, length, heads, kv_heads, dim = WHOLE
    kept = length * (heads + heads + 2 * kv_heads) // 2 * dim * 2 + length * heads // 2 * 4
    state = length // 8 * heads // 2 * dim * 4
    wanted = length // 2 * heads * dim * 2 + kept + state
    calls = [(2, 1, chunks, {"offload": None}) for chunks in (1, 8)]
    plain, found = least(pool, calls, lambda _, found: found[0][0] == wanted, 2)
    assert found[0][0] == wanted < plain[0][0]


def tensors() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = (2, 13, 4, 5), (2, 13, 2, 5), (2, 13, 2, 3)
    made = (torch.randn(s, generator=random, dtype=torch.float64) for s in shapes)
    return [x.requires_grad_() for x in made]


CHUNKED = {"causal": True, "chunks": 3, "head_chunks": 2, "offload": "cpu"}


def test_a_module_and_checkpoints_take_chunks() -> None:
    q, k, v = tensors()
    module = usp.LongContextAttention(**CHUNKED)
    assert "chunks=3, head_chunks=2, offload='cpu'" in repr(module)
    plain = usp.long_context_attention(q, k, v, causal=True)
    again = torch.utils.checkpoint.checkpoint(module, q, k, v, use_reentrant=False)
    expected = torch.autograd.grad(plain, (q, k, v), plain.detach())
    torch.testing.assert_close(again, plain)
    torch.testing.assert_close(torch.autograd.grad(again, (q, k, v), plain.detach()), expected)
    with torch.no_grad():
        torch.testing.assert_close(module(q, k, v), plain)


def test_under_torch_compile_they_break_the_graph() -> None:
    def function(*x: Tensor) -> Tensor:
        return usp.long_context_attention(*x, **CHUNKED) * 2

    q, k, v = tensors()
    with compiling.afresh():
        found = torch.compile(function, backend="aot_eager")(q, k, v)
    plain = usp.long_context_attention(q, k, v, causal=True) * 2
    torch.testing.assert_close(found, plain)
    dout = torch.ones_like(plain)
    expected = torch.autograd.grad(plain, (q, k, v), dout)
    torch.testing.assert_close(torch.autograd.grad(found, (q, k, v), dout), expected)
    with compiling.afresh(), pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(function, backend="aot_eager", fullgraph=True)(q, k, v)


def test_intervals_of_pairs_do_not_stay_on_a_device() -> None:
    """There are as many as chunks squared; the meta device stands for a GPU."""
    q, k, v = tensors()
    usp.long_context_attention(q, k, v, causal=True, chunks=3)
    masks = masks_of(make_mask(causal=True))
    plan = make_plan(masks, ("contiguous",) * 2, (13, 13), 1, 0, "auto", 1)
    chunked = make_chunks(plan, masks, 13, (13,), ((13,),), 3)
    loads = [load for plan in chunked.plans for step in plan.steps for load in step.loads]
    visits = [visit for load in loads for calls in load._calls.values() for visit in calls]
    spans = [visit.span for visit in visits if visit.span is not None]
    for span in spans:
        span.on(torch.device("meta"))
    usp.long_context_attention(q, k, v, causal=True, chunks=3)
    assert len(spans) == 3 and not any(span._on_device for span in spans)


@pytest.mark.parametrize("layout", ["striped", "zigzag"])
def test_causal_work_of_ranks_and_pages_of_turns(layout: str) -> None:
    """What docs/offload.md says of the order of tokens along a ring."""
    masks, length, ring, count = masks_of(make_mask(causal=True)), 256, 4, 4
    tokens = ((length // ring,),) * ring
    works, seen = [], []
    for rank in range(ring):
        plan = make_plan(masks, (layout,) * 2, (length, length), ring, rank, "auto", 1)
        turns = make_chunks(plan, masks, length, tokens[rank], tokens, count).plans
        works.append([sum(step.pairs for step in turn.steps) for turn in turns])
        seen.append([sum(step.pairs > 0 for step in turn.steps) for turn in turns])
    pairs = length // ring * length // count // 2
    totals = [sum(work) for work in works]
    assert max(totals) - min(totals) < min(totals) / 20
    if layout == "striped":
        assert seen == [[ring * (turn + 1) for turn in range(count)]] * ring
        assert all(max(turn) - min(turn) < pairs // 8 for turn in zip(*works, strict=True))
    else:
        assert works[0][0] < works[-1][0] / 4


def test_graphs_and_transforms_are_refused() -> None:
    q, k, v = (x.detach() for x in tensors())

    def function(*x: Tensor) -> Tensor:
        return usp.long_context_attention(*x, **CHUNKED)

    for call in (
        lambda: function(*(x.to("meta") for x in (q, k, v))),
        lambda: torch.func.vmap(function)(q[:, None], k[:, None], v[:, None]),
        lambda: torch.fx.experimental.proxy_tensor.make_fx(function)(q, k, v),
    ):
        with pytest.raises(NotImplementedError, match="which breaks its graph"):
            call()


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"chunks": 0}, ValueError, "chunks must be 1 or more, got 0"),
        ({"head_chunks": -1}, ValueError, "head_chunks must be 1 or more, got -1"),
        ({"chunks": 2.0}, TypeError, "chunks"),
        ({"offload": "disk"}, ValueError, "None, 'cpu', got 'disk'"),
        ({"chunks": 2, "transport": "queries"}, NotImplementedError, "transport='auto'"),
        ({"offload": "cpu", "queries": "replicated"}, NotImplementedError, "at once"),
    ],
)
def test_refusals(options: dict, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        usp.long_context_attention(*tensors(), **options)


def with_other_chunks() -> None:
    mesh = worker.mesh(2, 1)
    usp.long_context_attention(*tensors(), mesh, chunks=2 + mesh.rank)


def test_ranks_that_differ_hear_of_it(pool) -> None:
    with pytest.raises(worker.RemoteError, match=r"chunks .*\(2, 1\).*\(3, 1\)"):
        pool.run(with_other_chunks, ranks=2)


def test_a_drawn_seed_is_drawn_once_for_all_chunks() -> None:
    outs = []
    for count in (1, 4):
        torch.manual_seed(3)
        outs.append(usp.long_context_attention(*tensors(), dropout_p=0.5, chunks=count))
    torch.testing.assert_close(*outs)
