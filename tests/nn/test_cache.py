"""A cache that is cut over ranks: what its last tokens see is what they see of the whole."""

from __future__ import annotations

import re
from typing import Any

import pool as workers
import pytest
import torch
from cache_stories import Story, lived
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import RemoteError
from torch import Tensor

import usp
from usp.planning.cost import Place, Shape, bytes_sent
from usp.planning.layout import Replicated
from usp.testing import WireBytes, dense_attention

CHUNKED = (("extend", 13, "zigzag"), ("append", 1), ("append", 1), ("extend", 7, "contiguous"))
CHUNKED = (*CHUNKED, ("append", 5), ("append", 1))
SLIDING = tuple(("append", n) for n in (11, 1, 1, 3, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1))
DRAFTS = (("append", 6), ("append", 3), ("crop", 7), ("append", 2), ("select", (1, 1, 0)))
DRAFTS = (*DRAFTS, ("append", 1), ("append", 1))
STORIES = {
    "chunks, then tokens": Story(CHUNKED, heads=4, kv_heads=2, batch=2),
    "chunks attend as they are cut": Story(CHUNKED, attends=True, slopes=True),
    "a window with sink tokens": Story(SLIDING, window=4, first_keys=2, sinks=True),
    "latents of MLA": Story(CHUNKED, latent=True, heads=5, dim=7, value_dim=4, dtype="float32"),
    "texts of different lengths": Story(
        SLIDING, batch=3, padding=(0, 5, 2), window=5, first_keys=1, slopes=True
    ),
    "drafts and beams": Story(DRAFTS, batch=2, padding=(1, 0), heads=2, kv_heads=2),
}


def _lived(story: Story, ulysses: int, ring: int) -> Any:
    return lived(story, workers.mesh(ulysses, ring))


def judged(story: Story, results: list[list[tuple[Tensor, Tensor, tuple[int, ...]]]]) -> None:
    allowed = {"float64": 1e-12, "float32": 1e-5}[story.dtype]
    for event, (out, lse) in enumerate(story.told()):
        for mine in results:
            assert all(
                torch.equal(x, y)
                for x, y in zip(mine[event][:2], results[0][event][:2], strict=True)
            )
            assert mine[event][2] == results[0][event][2]
        torch.testing.assert_close(results[0][event][0].double(), out, rtol=0, atol=allowed)
        torch.testing.assert_close(results[0][event][1].double(), lse, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", STORIES)
def test_two_ranks(pool, name) -> None:
    judged(STORIES[name], pool.run(_lived, STORIES[name], 1, 2, ranks=2))


@pytest.mark.parametrize("name", STORIES)
def test_one_device(name) -> None:
    judged(STORIES[name], [lived(STORIES[name], None)])


@pytest.mark.long
@pytest.mark.parametrize("mesh", [(2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("name", STORIES)
def test_more_ranks(pool, name, mesh) -> None:
    story = STORIES[name]
    if mesh[0] > 1 and story.attends:
        with pytest.raises(RemoteError, match="ulysses_degree"):
            pool.run(_lived, story, *mesh, ranks=mesh[0] * mesh[1])
        return
    judged(story, pool.run(_lived, story, *mesh, ranks=mesh[0] * mesh[1]))


def test_a_window_holds_what_is_seen_and_as_much_again() -> None:
    story = Story(SLIDING, window=4, first_keys=2)
    held = [counts[0] for *_, counts in lived(story, None)]
    assert max(held) <= 2 * (4 + 2) + 11 and held[-1] < sum(n for _, n in SLIDING)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 9)),
        st.tuples(st.just("extend"), st.integers(0, 9), st.sampled_from(["contiguous", "zigzag"])),
    ),
    min_size=1,
    max_size=6,
)


@st.composite
def stories(draw: st.DrawFn) -> Story:
    window, batch = draw(st.sampled_from([None, 0, 1, 4])), draw(st.sampled_from([1, 2]))
    kv_heads, latent = draw(st.sampled_from([1, 2])), draw(st.booleans())
    return Story(
        tuple(draw(EVENTS)),
        batch=batch,
        heads=kv_heads * draw(st.sampled_from([1, 2, 3])),
        kv_heads=kv_heads,
        latent=latent,
        window=window,
        first_keys=draw(st.integers(0, 2)),
        padding=tuple(draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch))),
        page=draw(st.integers(1, 3)),
        sinks=draw(st.booleans()),
        slopes=draw(st.booleans()),
        attends=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
    )


@settings(max_examples=8)
@given(story=stories())
def test_whatever_comes(pool, story) -> None:
    judged(story, pool.run(_lived, story, 1, 2, ranks=2))


@pytest.mark.long
@settings(max_examples=25)
@given(story=stories())
def test_whatever_comes_to_four(pool, story) -> None:
    judged(story, pool.run(_lived, story, 1, 4, ranks=4))


def _wire(ulysses: int, ring: int, queries: int, context: int) -> list[int]:
    mesh = workers.mesh(ulysses, ring)
    cache, (q, k, v) = usp.ShardedCache(mesh), Story((), heads=6, kv_heads=2).new(context, 0)
    with WireBytes() as growing:
        cache.append(k, v)
    with WireBytes() as attending:
        usp.decode_attention(q[:, -queries:], cache, mesh, validate=False)
    return [growing.sent, attending.sent]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(("mesh", "ranks"), [((1, 2), 2), ((2, 1), 2)], ids=str)
def test_bytes_are_those_of_the_formula_whatever_the_context(pool, mesh, ranks, queries) -> None:
    """n of the N = Lq H rows are merged here: (N - n) (Dv + 1) there, n (P - 1) (Dv + 1) back."""
    for context in (9, 40):
        sent = pool.run(_wire, *mesh, queries, context, ranks=ranks)
        half = queries * 6 // 2 * (3 + 1) * 8
        assert sent == [[0, 2 * half]] * 2


def test_the_formula_of_the_wire_is_that_of_usp_plan() -> None:
    shape = Shape(
        batch=1, query_len=1, key_len=9, num_heads=6, num_kv_heads=2, head_dim=5,
        value_head_dim=3, dtype=torch.float64,
    )  # fmt: skip
    place = Place(2, 1, 0, 0, (Replicated(1), "contiguous"))
    assert bytes_sent(shape, place).total == 2 * 3 * 4 * 8


# Refusals ----------------------------------------------------------------------------------------


def _filled(**options: Any) -> tuple[usp.ShardedCache, Tensor, Tensor]:
    cache, (q, k, v) = usp.ShardedCache(**options), Story((), batch=2).new(6, 0)
    cache.append(k, v)
    return cache, q, k


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def _appended(k: Tensor, v: Tensor | None, **options: Any) -> None:
    usp.ShardedCache(**options).append(k, v)


ONE, ITS_VALUE = _ones(2, 1, 1, 5), _ones(2, 1, 1, 3)
REFUSED = {
    "no tokens": (lambda: usp.ShardedCache().k, "holds 0 tokens"),
    "no cache": (lambda: usp.decode_attention(ONE, ONE), "a Tensor"),
    "more queries": (
        lambda: usp.decode_attention(_ones(2, 7, 3, 5), _filled()[0]),
        "7 queries.* 6 tokens",
    ),
    "other heads": (
        lambda: _filled()[0].append(_ones(2, 1, 2, 5), _ones(2, 1, 2, 3)),
        "2, 2, 5.*2, 1, 5",
    ),
    "no values": (lambda: _appended(ONE, None), "v is None.* None"),
    "two values": (lambda: _appended(ONE, ITS_VALUE, value_dim=2), "v is given.* 2"),
    "wide values": (lambda: _appended(ONE, None, value_dim=9), "9.* 5"),
    "padding": (lambda: _appended(ONE, ITS_VALUE, padding=(1,)), "1 entries.* 2"),
    "values of other tokens": (
        lambda: _appended(_ones(1, 2, 1, 5), _ones(1, 3, 1, 5)),
        "1, 2, 1, 5.*1, 3, 1, 5",
    ),
    "kind": (lambda: _appended(_ones(1, 2), _ones(1, 2)), "batch, tokens"),
    "crop": (lambda: _filled()[0].crop(7), "7 of 6"),
    "sample": (lambda: _filled()[0].select([2]), "sample 2 in a batch of 2"),
    "layout": (lambda: _filled()[0].extend(ONE, ITS_VALUE, "striped", 1), "a run for each token"),
    "length of queries": (
        lambda: usp.decode_attention(_ones(2, 1, 3, 5), _filled()[0], layout="zigzag"),
        "seq_len",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(name) -> None:
    call, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message):
        call()


def test_what_a_window_dropped_is_missed() -> None:
    cache, q, k = _filled(window=1, page=1)
    for _ in range(4):
        cache.append(k[:, :1], k[:, :1, :, :3])
    with pytest.raises(ValueError, match=r"crop\(4\).* 4 .*before [5-9]"):
        cache.crop(4)
    with pytest.raises(ValueError, match="6 queries"):
        usp.decode_attention(q, cache)


def _different_caches() -> None:
    mesh = workers.mesh(1, 2)
    cache, (q, k, v) = usp.ShardedCache(mesh), Story(()).new(6, 0)
    cache.append(k[:, : 5 + mesh.rank], v[:, : 5 + mesh.rank])
    usp.decode_attention(q[:, :1], cache, mesh)


def _one_cache_is_shorter_than_the_queries() -> None:
    mesh = workers.mesh(1, 2)
    cache, (q, k, v) = usp.ShardedCache(mesh), Story(()).new(6, 0)
    cache.append(k[:, : 1 + mesh.rank], v[:, : 1 + mesh.rank])
    usp.decode_attention(q[:, :2], cache, mesh)


def _another_mesh() -> None:
    cache, (q, k, v) = usp.ShardedCache(workers.mesh(1, 2)), Story(()).new(6, 0)
    cache.append(k, v)
    usp.decode_attention(q, cache)


def _one_rank_is_wrong() -> None:
    mesh = workers.mesh(1, 2)
    cache, (_, k, v) = usp.ShardedCache(mesh), Story(()).new(6, 0)
    cache.extend(k[:, :3], v[:, : 3 - mesh.rank], seq_len=6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (_different_caches, "disagree on"),
        (_one_cache_is_shorter_than_the_queries, "2 queries, but the cache holds 1"),
        (_another_mesh, "mesh is None"),
        (_one_rank_is_wrong, "1, 3, 1, 5.*1, 2, 1, 3"),
    ],
)
def test_every_rank_hears_of_it(pool, wrong, message) -> None:
    for outcome in pool.outcomes(wrong, ranks=2):
        assert isinstance(outcome, RemoteError) and outcome.kind == "ValueError"
        assert re.search(message, outcome.message), outcome.message


def _gradients() -> tuple[Tensor, Tensor]:
    mesh = workers.mesh(1, 2)
    cache, (q, k, v) = usp.ShardedCache(mesh), Story((), kv_heads=3).new(7, 0)
    cache.append(k, v)
    sinks = torch.ones(3, dtype=q.dtype, requires_grad=True)
    q = q[:, -2:].clone().requires_grad_()
    out = usp.decode_attention(q, cache, mesh, sinks=sinks)
    (out.square().sum() / mesh.size).backward()
    return q.grad, sinks.grad


def test_queries_and_sinks_have_gradients(pool) -> None:
    """Each rank's part of the sum."""
    q, k, v = Story((), kv_heads=3).new(7, 0)
    q, sinks = q[:, -2:].clone().requires_grad_(), torch.ones(3).double().requires_grad_()
    dense_attention(q, k, v, causal=True, query_offset=5, sinks=sinks)[0].square().sum().backward()
    parts = pool.run(_gradients, ranks=2)
    for wanted, found in zip((q.grad, sinks.grad), zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(sum(found), wanted)
