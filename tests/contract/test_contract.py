"""Every kernel equals dense attention in fp64: out, lse and each gradient, row by row."""

from __future__ import annotations

import itertools

import pytest
from contract_cases import ROWS
from hypothesis import HealthCheck, given, settings
from kernel_call import Call
from promises import answers
from subjects import SIZES, Subject, held_to, mixture_with, mixtures_of
from subjects.families import FAMILIES, SUBJECTS
from subjects.native import COMPLETE


@pytest.mark.parametrize(("subject", "case"), [*held_to(ROWS, SUBJECTS), *mixtures_of(SUBJECTS)])
def test_equals_dense_attention(
    subject: Subject, case: Call, request: pytest.FixtureRequest
) -> None:
    subject.assert_right(case, subject.run(request, answers, case))


# How many draws, as a share of hypothesis' own number; interpreted ones are slow.
DRAWS = {"native": 1.0, "gpu_emulated": 0.15, "triton": 0.25, "gluon": 0.08}
# With one key or two, a rounded `out` is all that stands against dout v in a score's gradient.
SLACK = {"gpu_emulated": 8.0}


@pytest.mark.parametrize(
    ("subject", "family"),
    [
        subject.param(family, name="drawn")
        for family in DRAWS
        # the one of all dtypes draws the others, too
        for subject in ([COMPLETE] if family == "native" else FAMILIES[family])
    ],
)
def test_equals_dense_attention_in_any_mix(
    subject: Subject, family: str, request: pytest.FixtureRequest
) -> None:
    examples = max(8, int(settings.default.max_examples * DRAWS[family]))

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(drawn=subject.drawn())
    def judged(drawn: tuple[Subject, Call]) -> None:
        found, case = drawn
        got = found.run(request, answers, case)
        found.assert_right(case, got, SLACK.get(family, 1.0))

    judged()


def test_every_row_is_taken_or_has_a_reason() -> None:
    """The map of what is shown where: ``pytest -s -k has_a_reason`` prints it."""
    lines = [f"{'':36}" + " ".join(f"{family:22}" for family in FAMILIES)]
    reasons: dict[str, str] = {}
    for row, changes in ROWS.items():
        cells = []
        for family in FAMILIES.values():
            subject = COMPLETE if COMPLETE in family else family[0]
            reason = subject.why_not(row, subject.case(row, changes))
            mixture = mixture_with(subject, changes)
            if reason is not None and mixture is not None:
                cells.append(f"in {mixture}")
            else:
                known = reasons.setdefault(reason, f"({len(reasons)})") if reason else "yes"
                cells.append(known)
        assert "yes" in cells, row
        lines.append(f"{row:36}" + " ".join(f"{cell:22}" for cell in cells))
    print("", *lines, *(f"{key} {reason}" for reason, key in reasons.items()), sep="\n")
    assert all(len(reason.split()) > 5 for reason in reasons)


def test_a_subject_changes_sizes_alone() -> None:
    """What a row promises stays in it."""
    for subject, (row, changes) in itertools.product(SUBJECTS, ROWS.items()):
        assert set(subject.sizes(row, changes)) <= set(SIZES), (subject.name, row)
