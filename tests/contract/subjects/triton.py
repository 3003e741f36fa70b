"""The portable Triton kernels, source, in Triton's interpreter: workers of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from contract_cases import BIASES, LAYOUTS, SPANS, Changes
from hypothesis import strategies as st
from kernel_call import Call
from triton_interpreter import interpreted

from subjects import Result, Subject

DTYPES = {"head_dims_80_16": torch.bfloat16, "head_dims_256_256": torch.float16}

# Weights and their gradients are rounded to the inputs' dtype before they enter a product.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}

LENGTHS = st.sampled_from((0, 1, 2, 15, 16, 17, 31, 33, 65))
CALLS = st.builds(
    Call,
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
    layout=st.sampled_from(LAYOUTS),
    prior_keys=st.sampled_from((0, 1, 37)),
    seed=st.integers(0, 10**6),
)


@dataclass(frozen=True)
class Interpreted(Subject):
    base = Call(batch=1, lq=37, lk=59, heads=(2, 0, 1))
    lse_is_read = True
    odd_head_dim = 9

    @property
    def tolerance(self) -> Mapping[torch.dtype, float]:
        return TOLERANCE

    def sizes(self, row: str, changes: Changes) -> Changes:
        """Fewer rows where there are more sequences, or heads."""
        if row == "wide_gap":
            return {"lq": 41, "lk": 211}
        if row == "everything":  # scores of tens by ALiBi: their rounding shows at this tolerance
            return {"batch": 1}
        many = changes.get("batch") == 2 or "heads" in changes
        return {"lq": 19} if many and "lq" not in changes else {}

    def run(
        self, request: pytest.FixtureRequest, promise: Callable[..., Result], *args: Any
    ) -> Result:
        interpreter = request.getfixturevalue("interpreter")
        (found,) = interpreter.run(interpreted, promise, *args, ranks=1)
        return found  # type: ignore[no-any-return]

    def reason_against(self, row: str, case: Call) -> str | None:
        if max(case.head_dim, case.value_head_dim) > 256:
            return "head dims above 256 have no tiles"
        if case.lq > 257 or case.lk > 700:
            return "long ones take minutes in the interpreter: its tiles are 16, and many already"
        return None

    def dtypes(self, row: str) -> tuple[torch.dtype, ...]:
        if row == "span_causal":
            return tuple(TOLERANCE)
        return (DTYPES.get(row, torch.float32),)

    def drawn(self) -> st.SearchStrategy[tuple[Subject, Call]]:
        return st.tuples(st.just(self), CALLS)


SUBJECTS = [Interpreted("triton-interpreted")]
