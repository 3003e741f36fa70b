"""The compiled CPU ops, at each instruction set that this machine has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from contract_cases import BIASES, HEADS, LAYOUTS, RESULTS, SPANS
from hypothesis import strategies as st
from kernel_call import Call

from subjects import Result, Subject
from usp.machine import cpu
from usp.ops import native as ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CAPABILITIES = cpu.LEVELS
# They differ from what is below in bf16 alone, of which they round weights and gradients of scores.
BF16_ONLY = CAPABILITIES[3:]
# Half-precision inputs are exact in fp32, where all arithmetic happens: one tolerance for all. Only
# BF16 instructions round weights and gradients of scores, to 8 bits, for their products.
TOLERANCE = dict.fromkeys(DTYPES, 2e-5) | {torch.float64: 1e-11}
BF16_TOLERANCE = 2e-2

LENGTHS = st.sampled_from((0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 97, 127, 128, 129, 257))
CALLS = st.builds(
    Call,
    batch=st.integers(1, 3),
    lq=LENGTHS,
    lk=LENGTHS,
    heads=st.sampled_from(HEADS),
    head_dim=st.integers(1, 70),
    value_head_dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    span=st.sampled_from((*SPANS, "bands_at_once", "many_bands")),
    bias=st.sampled_from([None, *BIASES]),
    bias_holes=st.booleans(),
    alibi=st.sampled_from((None, "1H", "BH")),
    softcap=st.sampled_from((0.0, 0.7, 30.0)),
    dropout_p=st.sampled_from((0.0, 0.15, 0.9)),
    layout=st.sampled_from(LAYOUTS),
    prior_keys=st.sampled_from((0, 1, 37)),
    seed=st.integers(0, 10**6),
)


@contextmanager
def running_on(capability: str, threads: int = 1) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with mock.patch.dict(os.environ, USP_CPU_CAPABILITY=capability):
            yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Native(Subject):
    """Attributes: capability: The instruction set. threads: How many work on a call."""

    threads: int = 1

    bands_at_once = True
    lse_is_read = True
    result_spans = tuple(RESULTS)

    @property
    def capability(self) -> str:
        return self.name.removeprefix("native-")

    @property
    def tolerance(self) -> Mapping[torch.dtype, float]:
        rounds = self.capability in BF16_ONLY
        return TOLERANCE | ({torch.bfloat16: BF16_TOLERANCE} if rounds else {})

    def run(
        self, request: pytest.FixtureRequest, promise: Callable[..., Result], *args: Any
    ) -> Result:
        if ops.load_error() is not None:
            pytest.skip(f"compiled ops: {ops.load_error()}")
        with running_on(self.capability, self.threads):
            return promise(torch.ops.usp, *args)

    def dtypes(self, row: str) -> tuple[torch.dtype, ...]:
        """All of them at the highest set but those of BF16 alone."""
        if self.capability in BF16_ONLY:
            return (torch.bfloat16,)
        return DTYPES if self == COMPLETE else (torch.float32,)

    def reason_against(self, row: str, case: Call) -> str | None:
        if row.startswith("head_dims_with_softcap"):
            return "no head dim and no option has a kernel of its own"
        return None

    def orders(self) -> Sequence[Subject]:
        """Any time again, with two threads."""
        return [replace(self, threads=2)] * 5

    def drawn(self) -> st.SearchStrategy[tuple[Subject, Call]]:
        """The complete one draws its own level, too."""
        subjects = st.builds(Native, st.sampled_from([s.name for s in SUBJECTS]), st.integers(1, 3))
        return st.tuples(subjects, CALLS)


def of_this_machine() -> tuple[str, ...]:
    if ops.load_error() is not None:
        return ("default",)
    found = []
    for wanted in CAPABILITIES:
        with running_on(wanted, torch.get_num_threads()):
            found += [wanted] * (cpu.level() == wanted)  # else it fell to another
    return tuple(found)


SUBJECTS = [Native(f"native-{capability}") for capability in of_this_machine()]
COMPLETE = [subject for subject in SUBJECTS if subject.capability not in BF16_ONLY][-1]
