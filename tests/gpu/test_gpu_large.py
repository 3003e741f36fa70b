"""What fills the memory of a GPU: one after the other, ``make test-gpu``."""

from __future__ import annotations

import pytest
from gpu_checks import Long, Sampled, Subject, assert_right_far_apart, subject

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
__all__ = ["subject"]  # the fixture


def scaled(device: str, length: int) -> int:
    """A rehearsal is short."""
    return length if device == "cuda" else 67


def test_188160_tokens(subject: Subject) -> None:
    length = scaled(subject.device, 188_160)
    made = Sampled(subject, Long(length, 2, 128 if subject.device == "cuda" else 16))
    made.check(1, [0, 1, length // 2 + 1, length - 29, length - 1])


def test_1048576_tokens(subject: Subject) -> None:
    length = scaled(subject.device, 2**20)
    made = Sampled(subject, Long(length, 1, 64 if subject.device == "cuda" else 16))
    made.check(0, [0, 5, length // 16 + 1, length * 2 // 3, length - 1])


def test_more_than_2_to_the_31_elements(subject: Subject) -> None:
    length, heads, head_dim, window = 2**20, 17, 128, 1024
    assert length * heads * head_dim > 2**31
    if subject.device == "cpu":
        length, heads, head_dim, window = 67, 2, 16, 10
    made = Sampled(subject, Long(length, heads, head_dim, window))
    made.check(heads - 1, [0, window - 1, window, length - window - 7, length - 1])


def test_rows_that_lie_2_to_the_30_elements_apart(subject: Subject) -> None:
    assert_right_far_apart(subject, 2**30 + 16 if subject.device == "cuda" else 2**9)
