"""Every Triton kernel in the interpreter against dense attention in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from native_case import Case, assert_right, expected, largest, make_inputs
from pool import Pool
from test_native_ops import BIASES, HEADS, SPANS
from triton_interpreter import computed, delta_of, far_apart, finished, written_outside

# Weights and their gradients are rounded to the inputs' dtype before they enter a product.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
SMALL = Case(batch=1, lq=37, lk=59, heads=(2, 0, 1))


def assert_equal_to_oracle(case: Case, interpreter: Pool) -> None:
    (got,) = interpreter.run(computed, case, ranks=1, timeout=240)
    assert_right(case, make_inputs(case), got, TOLERANCE[case.dtype])


OPTIONS: dict[str, dict[str, Any]] = {
    **{f"span_{span}": {"span": span} for span in SPANS if span != "all"},
    "wide_gap": {"span": "gaps", "lq": 41, "lk": 211, "prior_keys": 1},
    **{f"bias_{bias}": {"bias": bias, "batch": 2, "lq": 19} for bias in BIASES},
    "bias_with_holes": {"bias": "BHQK", "bias_holes": True, "span": "window"},
    "padding": {"bias": "B11K", "bias_holes": True, "span": "causal", "batch": 2, "lq": 19},
    "softcap": {"softcap": 1.5},
    "softcap_far_above_the_scores": {"softcap": 1000.0},
    "alibi": {"alibi": "1H", "batch": 2, "lq": 19},
    "alibi_of_each_batch": {"alibi": "BH", "span": "causal", "batch": 2, "lq": 19},
    "dropout": {"dropout_p": 0.3},
    "carried_state": {"prior_keys": 77, "span": "random"},
    **{f"heads_{'_'.join(map(str, heads))}": {"heads": heads, "lq": 19} for heads in HEADS},
    **{f"head_dim_{dim}": {"head_dim": dim} for dim in (1, 40, 72, 96, 192)},
    "head_dim_80_bf16": {"head_dim": 80, "dtype": torch.bfloat16, "heads": (1, 0, 1)},
    "head_dim_256_fp16": {"head_dim": 256, "value_head_dim": 256, "dtype": torch.float16},
    "value_head_dim_larger": {"head_dim": 5, "value_head_dim": 33},
    "no_heads": {"heads": (0, 2, 2)},
    "no_queries": {"lq": 0, "span": "causal"},
    "no_keys": {"lk": 0},
    "no_batch": {"batch": 0, "bias": "1HQK"},
    "one_query": {"lq": 1, "bias": "BHQK"},
    "one_key": {"lk": 1, "bias": "BHQK"},
    "one_by_one": {"lq": 1, "lk": 1, "head_dim": 1, "value_head_dim": 1},
    "strides_heads_first": {"layout": "heads_first"},
    "strides_sliced": {"layout": "sliced", "span": "window"},
    "strides_expanded": {"layout": "expanded", "batch": 2, "lq": 19},
    "everything": {
        "span": "causal",
        "bias": "B1QK",
        "alibi": "BH",
        "softcap": 2.0,
        "dropout_p": 0.2,
        "prior_keys": 23,
        "value_head_dim": 9,
    },
}


@pytest.mark.parametrize("option", OPTIONS)
def test_equals_dense_attention(option: str, interpreter: Pool) -> None:
    assert_equal_to_oracle(replace(SMALL, **OPTIONS[option]), interpreter)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes(dtype: torch.dtype, interpreter: Pool) -> None:
    assert_equal_to_oracle(replace(SMALL, dtype=dtype, span="causal"), interpreter)


# In the last whole tiles of rows see nothing, and no step of the loop over keys reaches them.
LAST = {"strictly_causal": {}, "gaps": {}, "window": {"lq": 101, "lk": 16}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("span", LAST)
@pytest.mark.parametrize("prior_keys", [0, 21])
def test_the_last_step_fills_the_result(
    prior_keys: int, span: str, dtype: torch.dtype, interpreter: Pool
) -> None:
    case = replace(SMALL, span=span, dtype=dtype, value_head_dim=9, **LAST[span])
    case = replace(case, prior_keys=prior_keys)
    want = expected(case, make_inputs(case))["out"]
    for carried in (True, False)[: 1 if prior_keys else 2]:
        (result,) = interpreter.run(finished, case, carried, ranks=1)
        assert result.dtype == dtype
        assert largest(result.double() - want) <= TOLERANCE[dtype] * max(1.0, largest(want))


@pytest.mark.parametrize("shape", [(2, 300, 3, 16), (1, 5, 2, 40), (3, 1, 1, 256)])
def test_delta(shape: tuple[int, ...], interpreter: Pool) -> None:
    torch.manual_seed(0)
    dout, out = torch.randn(shape).transpose(0, 1).contiguous().transpose(0, 1), torch.randn(shape)
    (delta,) = interpreter.run(delta_of, dout, out.bfloat16(), ranks=1)
    exact = (dout.double() * out.bfloat16().double()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(delta.double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("head_dim", [13, 32])
def test_nothing_is_written_outside(head_dim: int, interpreter: Pool) -> None:
    case = replace(SMALL, bias="1HQK", head_dim=head_dim, value_head_dim=head_dim, heads=(3, 0, 3))
    (changed,) = interpreter.run(written_outside, case, ranks=1)
    assert changed == dict.fromkeys(("out", "lse", "delta", "dq", "dk", "dv", "dbias"), 0)


def test_rows_so_far_apart_that_a_tile_passes_31_bits(interpreter: Pool) -> None:
    """Of the memory between them, only what is used comes into being."""
    case = replace(SMALL, lq=20, lk=20, heads=(1, 0, 1), dtype=torch.bfloat16, span="causal")
    gap = 2**27 + 16
    assert (case.lq - 1) * gap > 2**31
    (got,) = interpreter.run(far_apart, case, gap, ranks=1)
    x = make_inputs(case)
    x.q = x.v = x.dout = x.k
    assert_right(case, x, got, TOLERANCE[case.dtype])


LENGTHS = st.sampled_from((0, 1, 2, 15, 16, 17, 31, 33, 65))


@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 2),
        lq=LENGTHS,
        lk=LENGTHS,
        heads=st.sampled_from(((2, 0, 1), (2, 1, 2), (1, 6, 7), (3, 0, 3))),
        head_dim=st.integers(1, 40),
        value_head_dim=st.integers(1, 40),
        dtype=st.sampled_from(list(TOLERANCE)),
        span=st.sampled_from(SPANS),
        bias=st.sampled_from([None, None, *BIASES]),
        bias_holes=st.booleans(),
        alibi=st.sampled_from((None, "1H", "BH")),
        softcap=st.sampled_from((0.0, 0.0, 0.7, 30.0)),
        dropout_p=st.sampled_from((0.0, 0.0, 0.15, 0.9)),
        layout=st.sampled_from(("contiguous", "heads_first", "sliced", "expanded")),
        prior_keys=st.sampled_from((0, 1, 37)),
        seed=st.integers(0, 10**6),
    )
)
@example(  # one key: of dq only the rounding of its weight is left
    case=Case(
        batch=1,
        lq=1,
        lk=1,
        heads=(2, 0, 1),
        head_dim=1,
        value_head_dim=5,
        dtype=torch.bfloat16,
        dropout_p=0.15,
        prior_keys=0,
        seed=15,
    )
)
@settings(
    deadline=None,
    max_examples=max(10, settings.default.max_examples // 4),
    suppress_health_check=list(HealthCheck),
)
def test_equals_dense_attention_in_any_mix(case: Case, interpreter: Pool) -> None:
    assert_equal_to_oracle(case, interpreter)
