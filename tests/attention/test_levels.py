"""Biases that hide, and rows whose keys share a large offset: alike on every mesh and backend."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import Case, local
from judge import attend, join, judge, oracle, run
from torch import Tensor

import usp
from usp.attention import levels
from usp.backends import TABLE, native
from usp.planning.problem import Traits

WITH_BIAS = Traits("cpu", torch.float64, 4, 4, 0.5, bias=True)
BACKENDS = [backend.NAME for backend in TABLE if not backend.reasons_against(WITH_BIAS)]
LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.bfloat16, torch.float16, torch.float32)}
CASE = Case(seq_len=23, heads=4, kv_heads=2, head_dim=8, value_dim=8, batch=2, return_lse=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fill", ["lowest", -1e9, -1e30, -1e4, 1e9])
def test_rows_of_a_fill(pool, fill: float | str, backend: str) -> None:
    """Fp32, against the oracle, which takes the offset off in fp64."""
    case = replace(CASE, bias="hq", bias_fill=fill, backend=backend, dtype="float32")
    for ulysses, ring, transport in ((1, 1, "ring"), (1, 3, "ring"), (2, 2, "allgather")):
        judge(replace(case, ulysses=ulysses, ring=ring, transport=transport), pool)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fill", ["lowest", -1e9])
@pytest.mark.parametrize("bias", ["", "b", "h"])
def test_padding_as_columns(pool, fill: float | str, bias: str, backend: str) -> None:
    """The first rows under a causal mask see padding alone; those after them do not."""
    case = replace(CASE, bias=bias, bias_fill=fill, backend=backend, causal=True, padding=0.1)
    for changes in ({}, {"ring": 3, "layout": "zigzag"}, {"ring": 2, "ulysses": 2}):
        judge(replace(case, **changes), pool)


@pytest.mark.parametrize("bias", ["", "q"])
def test_triton(interpreter, bias: str) -> None:
    case = Case(seq_len=9, ring=2, bias=bias, bias_fill=-1e9, causal=True, return_lse=True, seed=1)
    judge(replace(case, backend="triton", dtype="float32"), interpreter)


@pytest.mark.parametrize("dtype", LOWEST)
def test_the_lowest_number_hides_whatever_it_was_cast_to(pool, dtype: torch.dtype) -> None:
    low = str(dtype).removeprefix("torch.")
    case = replace(CASE, bias="q", bias_fill="lowest", bias_dtype=low, dtype="float32")
    ours = join(case, pool.run(run, case, ranks=1))
    exact = oracle(case)
    unseen = exact["lse"] == -torch.inf
    assert unseen.any() and torch.equal(ours["lse"] == -torch.inf, unseen)
    nobody = unseen.all(1)[..., None, None]
    assert (ours["out"].masked_select(nobody) == 0).all()
    assert (ours["dq"].masked_select(nobody) == 0).all()
    cast = torch.tensor([LOWEST[dtype], 2 * LOWEST[dtype], -torch.inf]).double()
    if dtype != torch.float16:  # whose lowest number is an ordinary one elsewhere
        assert (levels.hidden(cast) == -torch.inf).all()
        assert (levels.hidden(cast.float()) == -torch.inf).all()


def test_other_rows_are_those_of_sdpa() -> None:
    """As transformers fills a mask: padding rows wholly, others in part."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 13, 8, requires_grad=True) for _ in range(3))
    mask = torch.where(torch.rand(2, 1, 13, 13) < 0.4, torch.finfo(torch.float32).min, 0.0)
    mask[:, :, 3] = torch.finfo(torch.float32).min
    dout = torch.randn(2, 4, 13, 8)
    dout[:, :, 3] = 0  # nobody reads a padding row
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    ours = usp.long_context_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=mask)
    ours = ours.transpose(1, 2)
    assert (ours[:, :, 3] == 0).all()
    others = [row for row in range(13) if row != 3]
    torch.testing.assert_close(ours[:, :, others], theirs[:, :, others], rtol=0, atol=1e-5)
    for got, wanted in zip(
        torch.autograd.grad(ours, (q, k, v), dout),
        torch.autograd.grad(theirs, (q, k, v), dout),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", ["q", "bh"])
@pytest.mark.parametrize("fill", ["lowest", -1e9])
def test_compiled(fill: float | str, bias: str) -> None:
    case = replace(CASE, bias=bias, bias_fill=fill, causal=True, padding=0.1, on_mesh=False)
    eager = attend(case, local(case, 0), None)
    torch._dynamo.reset()
    compiled = torch.compile(usp.long_context_attention, backend="aot_eager", fullgraph=True)
    with mock.patch.object(usp, "long_context_attention", compiled):
        graph = attend(case, local(case, 0), None)
    for name, value in eager.items():
        assert torch.equal(graph[name], value), name


@pytest.mark.parametrize(
    "values",
    [[0.0, 1.0, -900.0], [0.0, -torch.inf, 5.0], [torch.nan, 0.0, 1.0], []],
    ids=["small", "hides", "nan", "none"],
)
def test_ordinary_biases_are_taken_as_they_are(values: list[float]) -> None:
    bias = torch.tensor(values)[None, None, None].expand(1, 1, 5, -1)
    given, large = levels.prepared(bias)
    if torch.nan not in values:
        assert given is bias and not large


def test_a_broadcast_bias_stays_broadcast() -> None:
    bias = torch.tensor([0.0, torch.finfo(torch.float32).min, -1e9]).expand(2, 3, 4, 3)
    given, large = levels.prepared(bias)
    assert large and given.stride() == (0, 0, 0, 1)
    assert given[1, 2, 3].tolist() == [0.0, -torch.inf, -1e9]


def test_what_a_row_does_not_see_has_no_say() -> None:
    """A bias above, or none at all, at keys that a causal mask hides."""
    q, k, v = torch.randn(3, 1, 11, 4, 8).unbind()
    bias = torch.full((1, 1, 11, 11), -1e9)
    wanted = usp.long_context_attention(q, k, v, causal=True)
    for above in (1e9, torch.inf, torch.nan):
        given = bias.masked_fill(torch.ones(11, 11, dtype=torch.bool).triu(1), above)
        for backend in BACKENDS:
            out = usp.long_context_attention(q, k, v, causal=True, attn_bias=given, backend=backend)
            if above is torch.nan:
                assert out.isfinite().all()
            else:
                torch.testing.assert_close(out, wanted, rtol=0, atol=1e-5)


def calls_of_kernels(bias: Tensor) -> int:
    """For a causal call with a bias for all rows, on one device."""
    q, k, v = torch.randn(3, 1, bias.shape[-1], 2, 8).unbind()
    calls = mock.Mock(wraps=native.attention_forward)
    with mock.patch.object(native, "attention_forward", calls):
        usp.long_context_attention(q, k, v, causal=True, attn_bias=bias, backend="native")
    return calls.call_count


@pytest.mark.skipif("native" not in BACKENDS, reason="the compiled extension is not there")
def test_rows_that_share_a_bias_share_calls() -> None:
    """One for each run of rows of a level, and a level for all that are near to each other."""
    keys = torch.arange(64.0)
    padding = torch.where(keys < 20, -1e9, 0.0)
    assert calls_of_kernels(padding[None, None, None]) == 2
    steep = 100 * keys  # from 1024 on, by 500 of 5 rows: 1100, 1700, ... 6300
    assert calls_of_kernels(steep[None, None, None]) == 1 + 9
    assert calls_of_kernels(keys[None, None, None]) == 1
