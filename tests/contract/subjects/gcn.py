"""AMD's machine code of a real build, executed: gfx90a and gfx942.

The kernels' own host code launches as it would on a GPU, ``emulators/gcn`` executes what clang has
made of them. A touch of anything but the tensors' elements, a register read while its load is under
way, or an instruction that it does not know, ends a test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from contract_cases import Changes, dims
from gcn.machine import Order
from gcn_ops import GcnOps, Programs
from gpu_builds import Builds
from gpu_emulated import emulated_ops
from kernel_call import Call

from subjects import Result, Subject

TARGETS = ("gfx90a", "gfx942")
# As late and as early as the program allows, and the waves of a workgroup in either order.
ORDERS = (Order(late=True), Order(late=False, descending=True), Order(late=True, descending=True))
BF16 = torch.bfloat16
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
LSE_TOLERANCE = 1e-6
# gfx90a takes denormals in products for 0: inputs of fp16 below 2^-14.
FLUSHED_LSE_TOLERANCE = 5e-5

MIXTURES: dict[str, Changes] = {
    # both sizes of the matrix instruction, every padded head dim
    "d32": {**dims(32), "dtype": BF16, "span": "causal"},
    "d64": {"heads": (3, 1, 2)},
    "d64_blocks_and_steps": {"lq": 131, "lk": 149, "dtype": BF16, "heads": (1, 0, 1)},
    "d96": {**dims(96, 72), "layout": "sliced", "span": "window"},
    "d128": {**dims(128), "dtype": BF16, "span": "causal"},
    "d192": {**dims(192, 128), "heads": (1, 0, 1)},
    "d256": {**dims(256), "dtype": BF16, "heads": (1, 0, 1)},
    "d256_options": {**dims(160, 256), "heads": (1, 0, 1), "softcap": 3.0},
    "d128_options": {**dims(72, 128), "bias": "BHQK", "dtype": BF16},
    # what is carried, seen and strided
    "carried_state": {"prior_keys": 41, "span": "random", "batch": 2, "dtype": BF16},
    "gaps": {"span": "gaps", "lk": 131, "layout": "heads_first"},
    "bands": {"span": "bands", "lk": 83, "heads": (1, 0, 1)},
    "rows_that_see_nothing": {"span": "strictly_causal", "dtype": BF16, "layout": "expanded"},
    "numbers_not_vectors": {**dims(61, 37), "span": "documents"},
    # options
    "bias": {"bias": "B1QK", "batch": 2, "heads": (1, 0, 1), "dtype": BF16},
    "padding": {"bias": "B11K", "bias_holes": True, "span": "causal"},
    "alibi": {"alibi": "1H", "span": "causal"},
    "softcap": {"softcap": 1.5, "dtype": BF16},
    "dropout": {"dropout_p": 0.3},
    "everything": {
        "lq": 31,
        "lk": 53,
        "batch": 2,
        "heads": (1, 3, 4),
        "span": "causal",
        "bias": "1HQK",
        "alibi": "BH",
        "softcap": 2.0,
        "dropout_p": 0.2,
        "prior_keys": 23,
        "value_head_dim": 9,
    },
}


@functools.cache
def programs_for(target: str, builds: Builds) -> Programs:
    return Programs(builds.of("hip").assembly(target), target)


@dataclass(frozen=True)
class Executed(Subject):
    """Attributes: order: When what is under way arrives, and which wave goes first."""

    order: Order = ORDERS[0]

    base = Call(
        batch=1,
        lq=37,
        lk=67,
        heads=(2, 0, 2),
        head_dim=64,
        value_head_dim=64,
        dtype=torch.float16,
    )
    fixtures = ("gpu_builds",)
    result_spans = ("strictly_causal",)
    mixtures = MIXTURES

    @property
    def target(self) -> str:
        return self.name.removeprefix("gcn-")

    @property
    def tolerance(self) -> Mapping[torch.dtype, float]:
        return TOLERANCE

    def run(
        self, request: pytest.FixtureRequest, promise: Callable[..., Result], *args: Any
    ) -> Result:
        programs = programs_for(self.target, request.getfixturevalue("gpu_builds"))
        return promise(GcnOps(emulated_ops(64), programs, self.order), *args)

    def reason_against(self, row: str, case: Call) -> str | None:
        return "every instruction is interpreted: kernel by kernel, a call here mixes several rows"

    def in_turn(self, number: int) -> Subject:
        return replace(self, order=ORDERS[(number + TARGETS.index(self.target)) % 3])

    def orders(self) -> Sequence[Subject]:
        return [replace(self, order=order) for order in ORDERS]

    def lse_tolerance(self, dtype: torch.dtype) -> float:
        flushes = self.target == "gfx90a" and dtype == torch.float16
        return FLUSHED_LSE_TOLERANCE if flushes else LSE_TOLERANCE


SUBJECTS = [Executed(f"gcn-{target}") for target in TARGETS]
