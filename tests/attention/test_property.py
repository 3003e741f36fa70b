"""Results do not depend on mesh, layout, transport or backend: draw all of them at random.

``pytest tests/attention/test_property.py --hypothesis-profile=long`` draws thousands of cases.
"""

from __future__ import annotations

import pytest
from cases import Case
from hypothesis import event, given, note, settings
from judge import judge
from mesh_cases import CORNERS, cases


@settings(max_examples=4 * settings.default.max_examples)
@given(case=cases())
def test_every_mesh_and_option_equals_dense_attention(pool, case: Case) -> None:
    event(f"ranks {case.ranks}")
    event(f"backend {case.backend}")
    note(f"python tests/judge.py {str(case)!r}")
    judge(case, pool)


@settings(max_examples=2 * settings.default.max_examples)
@given(case=cases(filled=True))
def test_a_large_offset_that_rows_share_changes_nothing(pool, case: Case) -> None:
    """Fp32 has no digits for a score beside it, nor an LSE for the number of keys."""
    event(f"fill {case.bias_fill}")
    note(f"python tests/judge.py {str(case)!r}")
    judge(case, pool)


@pytest.mark.parametrize("case", CORNERS, ids=repr)
def test_corners(pool, case: Case) -> None:
    judge(case, pool)
