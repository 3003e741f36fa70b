"""The GPU kernels' own sources on the CPU, with NVIDIA's and with AMD's matrix layouts.

What runs is csrc/gpu/*.cu, every line but the instructions that its stand-in replaces.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from contract_cases import BIASES, HEADS, LAYOUTS, OVERWRITTEN, SPANS, Changes
from gpu_emulated import emulated_ops
from hypothesis import strategies as st
from kernel_call import Call

from subjects import Result, Subject

WAVES = {"warps_of_32": 32, "waves_of_64": 64}
# those whose odd sizes, or the larger ones of two, have kernels of their own: both dtypes
IN_BOTH_DTYPES = ("32_32", "96_72", "128_128", "64_192", "192_128", "256_256", "40_256")

# Weights and their gradients are rounded to the inputs' dtype before the second product; lse
# is summed before that.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}

CALLS = st.builds(
    Call,
    batch=st.integers(1, 2),
    lq=st.sampled_from((1, 2, 15, 17, 64, 65, 129, 150)),
    lk=st.sampled_from((1, 3, 16, 31, 32, 33, 64, 97, 128, 130)),
    heads=st.sampled_from([heads for heads in HEADS if heads != (6, 0, 6)]),
    head_dim=st.sampled_from((1, 8, 32, 33, 64, 80)),
    value_head_dim=st.sampled_from((1, 8, 16, 31, 64, 100)),
    dtype=st.sampled_from(list(TOLERANCE)),
    span=st.sampled_from(SPANS),
    bias=st.sampled_from([None, *BIASES]),
    bias_holes=st.booleans(),
    alibi=st.sampled_from((None, "1H", "BH")),
    softcap=st.sampled_from((0.0, 0.7, 30.0)),
    dropout_p=st.sampled_from((0.0, 0.15, 0.9)),
    layout=st.sampled_from(LAYOUTS),
    prior_keys=st.sampled_from((0, 1, 37)),
    seed=st.integers(0, 10**6),
)


@dataclass(frozen=True)
class Emulated(Subject):
    """Attributes: descending: Whether the last wave of a block goes first."""

    descending: bool = False

    base = Call(batch=1, heads=(2, 0, 2), head_dim=64, value_head_dim=64, dtype=torch.float16)

    overwritten = OVERWRITTEN

    @property
    def wave_size(self) -> int:
        return WAVES[self.name.removeprefix("gpu_emulated-")]

    @property
    def tolerance(self) -> Mapping[torch.dtype, float]:
        return TOLERANCE

    def sizes(self, row: str, changes: Changes) -> Changes:
        """A fibre a thread: what is long is shorter here, and one head shows wide ones."""
        if row == "long":
            return {"lq": 263, "lk": 401}
        if row.startswith("head_dims"):
            return {"lq": 101, "lk": 83, "heads": (1, 0, 1)}
        return {"head_dim": 16} if "bias" in changes and "head_dim" not in changes else {}

    def run(
        self, request: pytest.FixtureRequest, promise: Callable[..., Result], *args: Any
    ) -> Result:
        if shutil.which("g++") is None:
            pytest.skip("needs g++")
        ops = emulated_ops(self.wave_size)
        ops.descending_waves(self.descending)
        try:
            return promise(ops, *args)
        finally:
            ops.descending_waves(False)

    def reason_against(self, row: str, case: Call) -> str | None:
        if max(case.head_dim, case.value_head_dim) > 256:
            return "head dims above 256 have no tiles"
        return None

    def dtypes(self, row: str) -> tuple[torch.dtype, ...]:
        both = row == "span_causal" or row.removeprefix("head_dims_") in IN_BOTH_DTYPES
        both = both or row.removeprefix("head_dims_with_softcap_") in IN_BOTH_DTYPES
        return (torch.float16, torch.bfloat16) if both else (torch.float16,)

    def kept(self, case: Call) -> list[tuple[torch.dtype, torch.dtype]]:
        return list(itertools.product((case.dtype, torch.float32), repeat=2))

    def orders(self) -> Sequence[Subject]:
        return [replace(self, descending=descending) for descending in (False, True)]

    def lse_tolerance(self, dtype: torch.dtype) -> float:
        return 1e-6

    def drawn(self) -> st.SearchStrategy[tuple[Subject, Call]]:
        return st.tuples(st.builds(Emulated, st.just(self.name), st.booleans()), CALLS)


SUBJECTS = [Emulated(f"gpu_emulated-{name}") for name in WAVES]
