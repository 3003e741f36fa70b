"""Gradients: added to what is there, or written over and rounded once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from contract_cases import OVERWRITTEN, SPANS
from kernel_call import largest
from promises import added, overwritten
from subjects import Subject
from subjects.families import SUBJECTS, of
from subjects.native import BF16_ONLY, DTYPES, Native


@pytest.mark.parametrize(
    ("subject", "bias"),
    [
        *(s.param("11QK", name="with_a_bias") for s in of("native", "gpu_emulated", "triton")),
        *(s.param(None, name="plain") for s in of("gluon")),
    ],
)
def test_gradients_are_added(
    subject: Subject, bias: str | None, request: pytest.FixtureRequest
) -> None:
    case = replace(subject.base, bias=bias)
    for once, twice in subject.run(request, added, case):
        assert once.abs().max() > 0
        torch.testing.assert_close(twice, 2 * once)


def calls() -> Iterator[Any]:
    """Triton's and Gluon's kernels add alone: ``block.py`` gives them zeros."""
    for subject in SUBJECTS:
        for row, changes in subject.overwritten.items():
            yield subject.param(subject.case(row, changes), name=row)
    for row, changes in OVERWRITTEN.items():
        # threads share out the rows of all keys, or of those that see them
        for span in SPANS if row in ("plain", "one_head_of_many_keys") else (None,):
            yield from of_cpu(row, changes if span is None else {**changes, "span": span})


def of_cpu(row: str, changes: Any) -> Iterator[Any]:
    for subject in of("native"):
        for dtype in DTYPES:
            if dtype == torch.bfloat16 or subject.name.removeprefix("native-") not in BF16_ONLY:
                bias = {"bias": "11QK", "value_head_dim": 24}
                case = replace(subject.base, dtype=dtype, **{**bias, **changes})
                name = f"{row}-{case.span}-{str(dtype).removeprefix('torch.')}"
                yield subject.param(case, name=name)


@pytest.mark.parametrize(("subject", "case"), list(calls()))
def test_overwritten_gradients_are_the_sums_rounded(
    subject: Subject, case: Any, request: pytest.FixtureRequest
) -> None:
    """Into memory that holds NaN, each in the inputs' dtype or the state's."""
    native = isinstance(subject, Native)
    subjects = [replace(subject, threads=n) for n in (1, 3)] if native else [subject]
    for held in subjects:
        exact = not native or held.threads == 1
        for result, unrounded in held.run(request, overwritten, case, held.kept(case)):
            want = unrounded.to(result.dtype)
            torch.testing.assert_close(result, want, **({"rtol": 0, "atol": 0} if exact else {}))
            nothing = case.span == "nothing" or not (case.lq and case.lk)
            assert nothing or largest(unrounded) > 0
