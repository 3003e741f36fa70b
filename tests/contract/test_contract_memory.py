"""What is written where, far apart or side by side, and the same bits in any order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from contract_cases import BITS
from kernel_call import Call, assert_right, make_inputs
from promises import (
    FAR,
    all_equal,
    answers,
    far_apart,
    far_apart_case,
    rows_far_apart,
    written_outside,
)
from subjects import Subject
from subjects.families import of
from subjects.native import COMPLETE

# The call whose bits each instruction or thread that is interpreted shows.
OF_COMPILED = {"ptx": "causal", "gcn": "causal_dropout_alibi"}


def with_orders() -> Iterator[Any]:
    """Triton's interpreter runs one program after the other, always the same way.

    Of the CPU's instruction sets one is enough for a dtype: all share out the rows alike.
    """
    cpu = ((COMPLETE, torch.float32), (of("native")[-1], torch.bfloat16))
    others = [(s, s.base.dtype) for s in of("gpu_emulated", "gluon", *OF_COMPILED)]
    for row, changes in BITS.items():
        for subject, dtype in (*cpu, *others):
            case = subject.case(row, changes, dtype)
            if subject.family in OF_COMPILED:
                taken = row == OF_COMPILED[subject.family]
            else:
                taken = subject.reason_against(row, case) is None
            if taken:
                name = f"{row}-{str(dtype).removeprefix('torch.')}"
                yield subject.param(case, name=name)


@pytest.mark.parametrize(("subject", "case"), list(with_orders()))
def test_the_same_inputs_give_the_same_bits(
    subject: Subject, case: Call, request: pytest.FixtureRequest
) -> None:
    """In any order of waves, of copies and products, at any time."""
    all_equal([held.run(request, answers, case) for held in subject.orders()])


@pytest.mark.parametrize(
    ("subject", "head_dim"),
    [
        s.param(head_dim, name=str(head_dim))
        for s in of("native", "gpu_emulated", "triton")
        for head_dim in (13, 32, 64)
    ],
)
def test_nothing_is_written_outside(
    subject: Subject, head_dim: int, request: pytest.FixtureRequest
) -> None:
    case = replace(subject.base, bias="1HQK", head_dim=head_dim, value_head_dim=head_dim)
    case = replace(case, heads=(3, 0, 3)) if subject.family == "triton" else case
    for name, largest in subject.run(request, written_outside, case).items():
        assert largest > 0, name


@pytest.mark.parametrize(
    ("subject", "far"),
    [s.param(far, name=far) for s in of("native", "gpu_emulated") for far in FAR],
)
def test_elements_past_2_to_the_31(
    subject: Subject, far: str, request: pytest.FixtureRequest
) -> None:
    case = far_apart_case(subject.base)
    got = subject.run(request, far_apart, case, far, 2**30 + 16)
    subject.assert_right(case, got)


@pytest.mark.parametrize("subject", [s.param(name="rows") for s in of("triton")])
def test_rows_so_far_apart_that_a_tile_passes_31_bits(
    subject: Subject, request: pytest.FixtureRequest
) -> None:
    case = replace(subject.base, lq=20, lk=20, heads=(1, 0, 1), dtype=torch.bfloat16, span="causal")
    gap = 2**27 + 16
    assert (case.lq - 1) * gap > 2**31
    got = subject.run(request, rows_far_apart, case, gap)
    x = make_inputs(case)
    x.q = x.v = x.dout = x.k
    assert_right(case, x, got, subject.tolerance[case.dtype])
