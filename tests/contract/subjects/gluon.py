"""The Hopper kernels in Gluon, source, on an emulator of barriers, loads and products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from contract_cases import SPANS, Changes
from gluon.machine import Timing
from hypothesis import strategies as st
from kernel_call import Call

from subjects import Result, Subject
from usp import kernels

# Loads and products at once, or as late as can be.
TIMINGS = [Timing(loads, products) for loads in (False, True) for products in (False, True)]

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}

CALLS = st.builds(
    Call,
    batch=st.integers(1, 2),
    lq=st.sampled_from((1, 63, 65, 128, 193)),
    lk=st.sampled_from((1, 15, 16, 33, 97)),
    heads=st.sampled_from(((1, 0, 1), (2, 1, 2), (3, 0, 3))),
    head_dim=st.sampled_from((16, 64, 104)),
    value_head_dim=st.sampled_from((16, 64, 104)),
    dtype=st.sampled_from(list(TOLERANCE)),
    span=st.sampled_from(SPANS),
    layout=st.sampled_from(("contiguous", "heads_first", "sliced")),
    prior_keys=st.sampled_from((0, 1, 37)),
    seed=st.integers(0, 10**6),
)


@dataclass(frozen=True)
class Emulated(Subject):
    """Attributes: timing: When loads and products that run by themselves are done."""

    timing: Timing = TIMINGS[0]

    base = Call(
        batch=1,
        lq=131,
        lk=83,
        heads=(2, 0, 2),
        head_dim=64,
        value_head_dim=64,
        dtype=torch.bfloat16,
    )
    lse_is_read = True
    odd_head_dim = 24

    @property
    def tolerance(self) -> Mapping[torch.dtype, float]:
        return TOLERANCE

    def sizes(self, row: str, changes: Changes) -> Changes:
        """Programs run one by one: fewer rows where there are more sequences, heads or columns."""
        if row.startswith(("heads", "no_heads")):
            return {"lq": 19}
        if row.startswith("head_dims"):
            return {"lq": 37}
        return {"lq": 67} if changes.get("batch") == 2 else {}

    def run(
        self, request: pytest.FixtureRequest, promise: Callable[..., Result], *args: Any
    ) -> Result:
        if not kernels.has_gluon():
            pytest.skip("no Triton with Gluon for Hopper")
        from hopper_case import small_steps
        from triton_interpreter import Kernels

        with small_steps(self.timing):
            return promise(Kernels, *args)

    def reason_against(self, row: str, case: Call) -> str | None:
        for option in ("bias", "softcap", "alibi", "dropout_p"):
            if getattr(case, option):
                return f"a call with {option} is the portable kernels'"
        if case.head_dim % 8 or case.value_head_dim % 8:
            return "rows that are no multiple of 16 bytes are the portable kernels': TMA"
        if max(case.head_dim, case.value_head_dim) > 128:
            return "the backward of head dims above 128 is the portable kernels'"
        if case.layout == "expanded":
            return "a dim of stride 0 is the portable kernels': TMA"
        if not (case.lk and case.batch):
            return "calls without keys or sequences are the portable kernels'"
        if case.lq > 257 or case.lk > 700:
            return "long ones take minutes here: its steps are 16, and many already"
        return None

    def dtypes(self, row: str) -> tuple[torch.dtype, ...]:
        both = (torch.bfloat16, torch.float16)
        return both if row == "span_causal" else (torch.bfloat16,)

    def in_turn(self, number: int) -> Subject:
        return replace(self, timing=replace(TIMINGS[number % 4], seed=number))

    def orders(self) -> Sequence[Subject]:
        return [replace(self, timing=timing) for timing in TIMINGS]

    def drawn(self) -> st.SearchStrategy[tuple[Subject, Call]]:
        timings = st.builds(Timing, st.booleans(), st.booleans(), st.integers(0, 10**6))
        return st.tuples(st.builds(Emulated, st.just(self.name), timings), CALLS)


SUBJECTS = [Emulated("gluon-emulated")]
