"""The compiled CPU ops against dense attention in fp64, straight through ``torch.ops``."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from native_case import (
    Case,
    assert_right,
    computed,
    expected,
    make_inputs,
    new_state,
    options,
    whole_and_in_blocks,
)
from torch import Tensor

from usp.ops import native as ops

pytestmark = pytest.mark.skipif(
    ops.load_error() is not None, reason=f"compiled ops: {ops.load_error()}"
)

CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")
# Half-precision inputs are exact in fp32, where all arithmetic happens: one tolerance for all. Only
# BF16 instructions round weights and gradients of scores, to 8 bits, for their products.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
BF16_TOLERANCE = 2e-2


@contextmanager
def running_on(capability: str, threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    os.environ["USP_CPU_CAPABILITY"] = capability
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        del os.environ["USP_CPU_CAPABILITY"]
        torch.set_num_threads(before)


def tolerance(case: Case) -> float:
    rounded = case.capability == "avx512_bf16" and case.dtype == torch.bfloat16
    return BF16_TOLERANCE if rounded else TOLERANCE[case.acc]


def assert_equal_to_oracle(case: Case) -> None:
    with running_on(case.capability, case.threads):
        x = make_inputs(case)
        got = computed(case, x)
    assert_right(case, x, got, tolerance(case))


SPANS = ("all", "causal", "window", "strictly_causal", "documents", "gaps", "random")
BIASES = ["".join(pick) for pick in itertools.product("B1", "H1", "Q1", "K")]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HEADS = ((4, 0, 2), (3, 0, 1), (3, 1, 2), (5, 3, 4), (1, 6, 7), (6, 0, 6), (2, 7, 8))

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    **{f"span_{span}": {"span": span} for span in SPANS[1:]},
    **{f"bias_{bias}": {"bias": bias} for bias in BIASES},
    "bias_with_holes": {"bias": "BHQK", "bias_holes": True},
    "padding": {"bias": "B11K", "bias_holes": True, "span": "causal"},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": "1H"},
    "alibi_of_each_batch": {"alibi": "BH", "span": "causal"},
    "dropout": {"dropout_p": 0.3},
    "everything": {
        "span": "causal",
        "bias": "B1QK",
        "alibi": "BH",
        "softcap": 2.0,
        "dropout_p": 0.2,
        "prior_keys": 23,
        "value_head_dim": 9,
    },
    "carried_state": {"prior_keys": 200, "span": "random"},
    **{f"heads_{'_'.join(map(str, heads))}": {"heads": heads} for heads in HEADS},
    "no_heads": {"heads": (0, 2, 2)},
    "no_queries": {"lq": 0, "span": "causal"},
    "no_keys": {"lk": 0},
    "no_batch": {"batch": 0, "bias": "1HQK"},
    "one_query": {"lq": 1, "bias": "BHQK"},
    "one_key": {"lk": 1, "bias": "BHQK"},
    "one_by_one": {"lq": 1, "lk": 1, "head_dim": 1, "value_head_dim": 1},
    "value_head_dim_larger": {"head_dim": 5, "value_head_dim": 33},
    "large_head_dim": {"head_dim": 512, "value_head_dim": 257, "lq": 19},
    "long": {"lq": 521, "lk": 1031, "span": "causal", "batch": 1, "heads": (2, 0, 2)},
    "strides_heads_first": {"layout": "heads_first"},
    "strides_sliced": {"layout": "sliced", "span": "window"},
    "strides_expanded": {"layout": "expanded"},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_equals_dense_attention(option: str, dtype: torch.dtype) -> None:
    assert_equal_to_oracle(Case(dtype=dtype, **OPTIONS[option]))


@pytest.mark.parametrize("capability", ["default", "avx2"])
@pytest.mark.parametrize("option", OPTIONS)
def test_lower_instruction_sets(option: str, capability: str) -> None:
    assert_equal_to_oracle(Case(capability=capability, **OPTIONS[option]))


@pytest.mark.parametrize("option", OPTIONS)
def test_bf16_instructions(option: str) -> None:
    assert_equal_to_oracle(Case(capability="avx512_bf16", dtype=torch.bfloat16, **OPTIONS[option]))


LENGTHS = st.sampled_from((0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 97, 127, 128, 129, 257))


@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 3),
        lq=LENGTHS,
        lk=LENGTHS,
        heads=st.sampled_from(HEADS),
        head_dim=st.integers(1, 70),
        value_head_dim=st.integers(1, 70),
        dtype=st.sampled_from(DTYPES),
        span=st.sampled_from(SPANS),
        bias=st.sampled_from([None, *BIASES]),
        bias_holes=st.booleans(),
        alibi=st.sampled_from((None, "1H", "BH")),
        softcap=st.sampled_from((0.0, 0.7, 30.0)),
        dropout_p=st.sampled_from((0.0, 0.15, 0.9)),
        layout=st.sampled_from(("contiguous", "heads_first", "sliced", "expanded")),
        prior_keys=st.sampled_from((0, 1, 37)),
        capability=st.sampled_from(CAPABILITIES),
        threads=st.integers(1, 3),
        seed=st.integers(0, 10**6),
    )
)
@example(case=Case(span="gaps", lq=128, lk=257, bias="11QK", bias_holes=True, prior_keys=1))
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_equals_dense_attention_in_any_mix(case: Case) -> None:
    assert_equal_to_oracle(case)


def test_three_blocks_equal_one() -> None:
    case = Case(lk=300, dtype=torch.float64)
    x = make_inputs(case)
    whole, parts = whole_and_in_blocks(case, x)
    for one, three in zip(whole, parts, strict=True):
        torch.testing.assert_close(three, one, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("span", ["nothing", "only -inf scores"])
def test_a_row_that_sees_nothing_keeps_its_state_to_the_bit(span: str) -> None:
    case = Case()
    x = make_inputs(case)
    if span == "nothing":
        x.first = x.stop = torch.full((case.lq,), 7, dtype=torch.int32)
    else:
        x.bias = torch.full((1, 1, 1, case.lk), -torch.inf)
    out, lse = torch.randn(new_state(case)[0].shape), torch.randn(new_state(case)[1].shape)
    kept = out.clone(), lse.clone()
    shared = options(case, x, slice(None), masked=True)
    torch.ops.usp.attention_forward(x.q, x.k, x.v, *shared, out, lse)
    assert torch.equal(out, kept[0]) and torch.equal(lse, kept[1])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("span", ["all", "gaps", "nothing"])
@pytest.mark.parametrize("prior", [False, True])
def test_a_result_is_the_new_out_rounded(
    span: str, dtype: torch.dtype, prior: bool, capability: str
) -> None:
    case = Case(span="all" if span == "nothing" else span, dtype=dtype)
    x = make_inputs(case)
    shared = options(case, x, slice(None), masked=True)
    if span == "nothing":
        shared[:2] = [torch.full((case.lq,), 7, dtype=torch.int32)] * 2
    with running_on(capability, 2):
        out, lse = new_state(case)
        if prior:
            torch.ops.usp.attention_forward(x.q, x.k, x.v, *shared, out, lse)
        before, last_lse = out.clone() if prior else None, lse.clone()
        result = torch.full_like(out, torch.nan, dtype=dtype)
        torch.ops.usp.attention_forward(x.q, x.k, x.v, *shared, before, last_lse, result)
        kept = out.clone()
        torch.ops.usp.attention_forward(x.q, x.k, x.v, *shared, out, lse)
    assert before is None or torch.equal(before, kept)
    assert torch.equal(lse, last_lse)
    assert torch.equal(result, out.to(dtype))


# Powers of two step through every exponent of a half, numbers around them round both ways.
def test_results_round_as_torch_does() -> None:
    steps = torch.arange(-40, 20, dtype=torch.float32)
    values = torch.cat([2**steps * f for f in (1, 1.0004, 1.00049, 1.0005, 1.0037, 1.004, 1.9999)])
    values = torch.cat([values, -values, torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])])
    count = len(values)
    case = Case(heads=(1, 0, 1), dtype=torch.float16)
    for dtype in (torch.float16, torch.bfloat16):
        q, k = (torch.zeros(1, n, 1, 16, dtype=dtype) for n in (count, 1))
        out = values.repeat_interleave(16).view(1, count, 1, 16)
        lse, nothing = torch.zeros(1, 1, count), torch.zeros(count, dtype=torch.int32)
        for capability in CAPABILITIES:
            with running_on(capability, 1):
                result = torch.zeros_like(out, dtype=dtype)
                scalars = (0, 1, 1, case.head_dim**-0.5, 0.0, 0.0, 0)
                args = (q, k, k, nothing, nothing, None, None, None, None, *scalars)
                torch.ops.usp.attention_forward(*args, out, lse.clone(), result)
            torch.testing.assert_close(result, out.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 67, 3, 40), (1, 64, 1, 7), (1, 0, 2, 8), (2, 130, 1, 128)])
def test_delta(shape: tuple[int, ...], dtype: torch.dtype, capability: str) -> None:
    torch.manual_seed(4)
    batch, rows, heads, _ = shape
    dout = torch.randn(batch, heads, rows, shape[3]).to(dtype).transpose(1, 2)
    out = torch.randn(shape).to(dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    result = torch.full((batch, heads, rows), torch.nan, dtype=acc)
    with running_on(capability, 2):
        torch.ops.usp.attention_delta(dout, out, result)
    exact = (dout.double() * out.double()).sum(-1).transpose(1, 2)
    bound = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=bound * shape[3])


@pytest.mark.parametrize("where", [0, 150, 299])
def test_one_key_far_above_the_rest(where: int) -> None:
    case = Case(lk=300, lq=70, prior_keys=0)
    x = make_inputs(case)
    x.bias = torch.zeros(1, 1, 1, case.lk)
    x.bias[..., where] = 200.0
    got, want = computed(case, x), expected(case, x)
    for name, reference in want.items():
        torch.testing.assert_close(got[name].double(), reference, rtol=1e-5, atol=1e-5)


def test_gradients_are_added() -> None:
    case = Case(bias="11QK")
    x = make_inputs(case)
    out, lse = new_state(case)
    shared = options(case, x, slice(None), masked=True)
    torch.ops.usp.attention_forward(x.q, x.k, x.v, *shared, out, lse)
    delta = (x.dout * out).sum(-1).transpose(1, 2).contiguous()
    once, twice = ([torch.zeros_like(t) for t in (x.q, x.k, x.v, x.bias)] for _ in range(2))
    for sums, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            args = (x.dout, x.q, x.k, x.v, delta, lse, *shared)
            torch.ops.usp.attention_backward(*args, *sums)
    for one, two in zip(once, twice, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(two, 2 * one)


SIZES = ({}, {"batch": 1, "lq": 130, "lk": 600, "heads": (1, 0, 1)}, {"lq": 0}, {"lk": 0})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", ["all", "causal", "window", "documents", "gaps", "random"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_overwritten_gradients_are_the_sums_rounded(
    size: dict[str, Any], span: str, dtype: torch.dtype
) -> None:
    case = Case(**size, span=span, dtype=dtype, bias="11QK", value_head_dim=24)
    x = make_inputs(case)
    lse, delta = torch.randn(2, case.batch, case.heads[0], case.lq, dtype=case.acc)
    args = (x.dout, x.q, x.k, x.v, delta, lse + 4, *options(case, x, slice(None), masked=True))
    capabilities = CAPABILITIES if dtype == torch.bfloat16 else CAPABILITIES[:3]
    for capability, threads in itertools.product(capabilities, (1, 3)):
        with running_on(capability, threads):
            sums = [torch.zeros(t.shape, dtype=case.acc) for t in (x.q, x.k, x.v, x.bias)]
            torch.ops.usp.attention_backward(*args, *sums)
            for kept in {dtype, case.acc}:
                made = [torch.full_like(t, torch.nan, dtype=kept) for t in sums[:3]]
                dbias = torch.zeros_like(sums[3])
                torch.ops.usp.attention_backward(*args, *made, dbias, True)
                for got, want in zip((*made, dbias), sums, strict=True):
                    # threads share out the rows of all keys, or of those that see them
                    exact = {"rtol": 0, "atol": 0} if threads == 1 else {}
                    torch.testing.assert_close(got, want.to(got.dtype), **exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [None, "11QK", "B11K"])
def test_the_same_inputs_give_the_same_bits(dtype: torch.dtype, bias: str | None) -> None:
    case = Case(lq=400, lk=517, span="random", dropout_p=0.1, bias=bias, dtype=dtype)
    x = make_inputs(case)
    reference = computed(case, x)
    for _ in range(4):
        for name, result in computed(case, x).items():
            assert torch.equal(result, reference[name]), name


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("bias", [None, "1HQK", "B11K"])
def test_any_number_of_threads(threads: int, bias: str | None) -> None:
    case = Case(batch=3, lq=200, lk=300, span="causal", bias=bias, threads=threads)
    assert_equal_to_oracle(case)


def test_elements_past_2_to_the_31() -> None:
    """Rows that lie 2^30 elements apart; only the pages that are used come into being."""
    rows, width, gap = 3, 8, 2**30 + 16
    case = Case(batch=1, lq=rows, lk=rows, heads=(1, 0, 1), head_dim=width, value_head_dim=width)
    case = replace(case, dtype=torch.bfloat16, span="causal")
    x = make_inputs(case)
    far = torch.empty(rows * gap, dtype=case.dtype).as_strided(x.k.shape, (1, gap, 1, 1))
    x.q = x.k = x.v = x.dout = far.copy_(x.k)
    want = expected(case, x)
    for capability in CAPABILITIES:
        with running_on(capability, 1):
            got = computed(case, x)
        bound = tolerance(replace(case, capability=capability))
        for name, result in got.items():
            torch.testing.assert_close(result.double(), want[name], rtol=bound, atol=bound)


def samples() -> list[tuple[Any, tuple[Any, ...]]]:
    found = []
    for case in (Case(), Case(bias="B1QK", span="causal", alibi="1H", dropout_p=0.1, softcap=3.0)):
        x = make_inputs(case)
        out, lse = new_state(case)
        shared = options(case, x, slice(None), masked=True)
        found.append((torch.ops.usp.attention_forward.default, (x.q, x.k, x.v, *shared, out, lse)))
        grads = [None if t is None else torch.zeros_like(t) for t in (x.q, x.k, x.v, x.bias)]
        lse = torch.randn_like(lse)
        saved = (x.dout, x.q, x.k, x.v, torch.randn_like(lse), lse)
        found.append((torch.ops.usp.attention_backward.default, (*saved, *shared, *grads)))
    return found


@pytest.mark.parametrize("sample", range(4))
def test_opcheck(sample: int) -> None:
    op, args = samples()[sample]
    torch.library.opcheck(op, args)


def test_compiles_in_one_graph() -> None:
    case = Case(span="causal")
    x = make_inputs(case)
    shared = options(case, x, slice(None), masked=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = new_state(case)
        torch.ops.usp.attention_forward(q, k, v, *shared, out, lse)
        return out * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.q, x.k, x.v), attend(x.q, x.k, x.v))
