"""The running softmax: what is carried, what a row that sees nothing keeps, what is finished."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from contract_cases import RESULTS
from kernel_call import assert_right, expected, make_inputs
from promises import (
    in_blocks,
    one_key_far_above,
    results,
    scaled,
    state_of_blind_rows,
    with_one_key_above,
)
from subjects import Subject
from subjects.families import SUBJECTS, of
from subjects.native import COMPLETE

TAKE_A_BIAS = of("native", "gpu_emulated", "triton")


def params(subjects: list[Subject], *values: Any) -> list[Any]:
    """Each subject with each value."""
    return [s.param(value, name=str(value).split(".")[-1]) for value in values for s in subjects]


# fp64 shows that the formula is exact; a state of fp32 is as exact as that.
BLOCKS = {"native": (1e-13, 1e-13), "gpu_emulated": (2e-4, 1e-6), "triton": (2e-6, 2e-6)}
BLOCKS |= {"gluon": (2e-3, 1e-6)}


@pytest.mark.parametrize(
    ("subject", "softcap"),
    [
        *params([COMPLETE, *of("gpu_emulated", "triton")], 0.0, 5.0),
        *params(of("gluon"), 0.0),
    ],
)
def test_three_blocks_equal_one(
    subject: Subject, softcap: float, request: pytest.FixtureRequest
) -> None:
    case = replace(subject.base, lk=300, softcap=softcap)
    if subject is COMPLETE:
        case = replace(case, dtype=torch.float64)
    whole, parts = subject.run(request, in_blocks, case)
    for one, three, bound in zip(whole, parts, BLOCKS[subject.family], strict=True):
        torch.testing.assert_close(three, one, rtol=bound, atol=bound)


@pytest.mark.parametrize(
    ("subject", "why"),
    [
        *params([*TAKE_A_BIAS, *of("gluon")], "span", "span of some rows"),
        *params(TAKE_A_BIAS, "bias"),
    ],
)
def test_a_row_that_sees_nothing_keeps_its_state_to_the_bit(
    subject: Subject, why: str, request: pytest.FixtureRequest
) -> None:
    case = replace(subject.base, lq=70)
    subject.run(request, state_of_blind_rows, case, why)


@pytest.mark.parametrize("prior_keys", [0, 21])
@pytest.mark.parametrize(
    ("subject", "span", "dtype"),
    [
        subject.param(span, dtype, name=f"{span}-{str(dtype).removeprefix('torch.')}")
        for span in RESULTS
        for subject in SUBJECTS
        if span in subject.result_spans
        for dtype in subject.all_dtypes
    ],
)
def test_a_result_is_the_new_out_rounded(
    subject: Subject,
    span: str,
    dtype: torch.dtype,
    prior_keys: int,
    request: pytest.FixtureRequest,
) -> None:
    case = replace(subject.base, span=span, dtype=dtype, prior_keys=prior_keys, **RESULTS[span])
    case = replace(case, value_head_dim=subject.odd_head_dim if prior_keys else case.head_dim)
    want = expected(case, make_inputs(case))
    for carried in (True,) if prior_keys else (True, False):
        got = subject.run(request, results, case, carried, subject.lse_is_read)
        assert got["result"].dtype == dtype
        assert torch.equal(got["result"], got["out"].to(dtype))
        assert torch.equal(got["last_lse"], got["lse"])
        scale = max(1.0, want["out"].abs().max().item())
        # rounding an output of `scale`, beside what its dtype costs elsewhere
        bound = subject.tolerance[dtype] + torch.finfo(dtype).eps / 2
        assert (got["result"].double() - want["out"]).abs().max() <= bound * scale


@pytest.mark.parametrize(("subject", "where"), params(TAKE_A_BIAS, 0, 150, 299))
def test_one_key_far_above_the_rest(
    subject: Subject, where: int, request: pytest.FixtureRequest
) -> None:
    case = replace(subject.base, lk=300, lq=70)
    got = subject.run(request, one_key_far_above, case, where)
    x = with_one_key_above(case, where)
    assert_right(case, x, got, subject.tolerance[case.dtype], subject.lse_tolerance(case.dtype))


@pytest.mark.parametrize(("subject", "scale"), params(TAKE_A_BIAS, -0.125, 0.0))
def test_scales_that_are_not_positive(
    subject: Subject, scale: float, request: pytest.FixtureRequest
) -> None:
    case = replace(subject.base, span="causal")
    out, lse = subject.run(request, scaled, case, scale)
    x = make_inputs(case)
    x.q = x.q.double() * (scale * case.head_dim**0.5)
    want = expected(case, x)
    bound = 2 * subject.tolerance[case.dtype]
    torch.testing.assert_close(out.double(), want["out"], rtol=0, atol=bound)
    torch.testing.assert_close(lse.double(), want["lse"], rtol=1e-6, atol=1e-6)
