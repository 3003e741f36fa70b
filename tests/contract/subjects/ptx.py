"""What nvcc makes of the GPU kernels for sm_80, executed: inline assembly, operand order and all.

The kernels' own host code launches (the CPU stand-in's), ``emulators/ptx`` runs the PTX that a real
build of the wheel left behind: warps one after the other, and without races.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ptx
import pytest
import torch
from contract_cases import Changes, dims
from gpu_builds import Builds
from gpu_emulated import emulated_ops
from kernel_call import Call
from ptx_ops import Kernels, PtxOps

from subjects import Result, Subject

SOURCES = ("attention_forward", "attention_backward", "bias_backward")
BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 8e-3, FP16: 1e-3}
ORDERS: tuple[ptx.Order, ...] = ("ascending", "descending", "random")

# Kernels without options, of every head dim that there are tiles for, and both dtypes.
PLAIN: dict[str, Changes] = {
    "fp16_64": {"lq": 131, "lk": 67, "heads": (3, 1, 2), "span": "causal"},
    "bf16_64": {"dtype": BF16, "span": "gaps", "lk": 131, "layout": "sliced"},
    "fp16_128": {"span": "window", "lq": 67, "prior_keys": 19, "heads": (1, 0, 1), **dims(128)},
    "bf16_128": {"dtype": BF16, "layout": "heads_first", "lq": 19, **dims(128)},
    "fp16_40": {"span": "documents", "heads": (3, 1, 2), **dims(40, 24)},
    "bf16_40": {"dtype": BF16, "span": "random", "layout": "expanded", "batch": 2, **dims(40, 64)},
    "fp16_32": {"span": "strictly_causal", **dims(32)},
    "bf16_32": {"dtype": BF16, "lq": 1, "lk": 1, **dims(8)},
    "fp16_32_bands": {"span": "bands", "lq": 37, "lk": 83, "heads": (1, 0, 1), **dims(32)},
    "fp16_96": {"heads": (1, 0, 1), **dims(96, 72)},
    "bf16_96": {"dtype": BF16, "heads": (1, 6, 7), "span": "causal", **dims(96)},
    "fp16_192": {"lq": 17, "lk": 41, "heads": (1, 0, 1), **dims(192)},
    "bf16_192": {"dtype": BF16, "lq": 17, "lk": 41, "heads": (1, 0, 1), **dims(136, 192)},
    "fp16_256": {"lq": 17, "lk": 41, "heads": (1, 0, 1), **dims(256)},
    "bf16_256": {"dtype": BF16, "lq": 17, "lk": 41, "heads": (1, 0, 1), **dims(248, 64)},
}
LITTLE: dict[str, Any] = {"lq": 19, "lk": 37, "heads": (1, 0, 1)}
# Kernels with options have three sizes.
OPTIONS: dict[str, Changes] = {
    "everything": {
        "span": "causal",
        "alibi": "BH",
        "softcap": 2.0,
        "dropout_p": 0.2,
        "prior_keys": 13,
        "bias": "B1QK",
        "bias_holes": True,
        "lq": 29,
        "lk": 43,
        "value_head_dim": 40,
        "heads": (2, 1, 2),
    },
    "bias_and_softcap_bf16": {
        **LITTLE,
        "dtype": BF16,
        "bias": "1HQK",
        "softcap": 5.0,
        **dims(64, 9),
    },
    "alibi": {**LITTLE, "alibi": "1H", "span": "gaps", "lk": 83, **dims(128)},
    "window_and_bias": {**LITTLE, "span": "window", "bias": "11QK", **dims(128, 64)},
    "dropout_bf16": {
        **LITTLE,
        "dtype": BF16,
        "dropout_p": 0.3,
        "bias": "B1QK",
        "lk": 79,
        **dims(128, 40),
    },
    "odd_head_dims": {**LITTLE, "bias": "111K", **dims(253, 37)},
    "odd_head_dims_bf16": {**LITTLE, "dtype": BF16, "bias": "11QK", **dims(256, 193)},
}
OVERWRITTEN: dict[str, Changes] = {
    "plain": {"span": "gaps", "heads": (3, 1, 2)},
    "dk_in_parts": {**LITTLE, "dtype": BF16, "span": "window", **dims(192, 136)},
    "options": {**LITTLE, "bias": "11QK", "softcap": 2.0, **dims(61, 37)},
}


def machine(order: ptx.Order, together: int = 1, races: bool = False) -> Any:
    return lambda memory: ptx.Machine(memory, order, together, races=races)


@functools.cache
def kernels_for(architecture: str, builds: Builds) -> Kernels:
    built = builds.of("cuda")
    return Kernels(built.ptx(source, architecture) for source in SOURCES)


@dataclass(frozen=True)
class Executed(Subject):
    """Attributes: order: Of the warps. together: How many steps one of them goes at once."""

    order: ptx.Order = "descending"
    together: int = 1
    races: bool = True

    base = Call(
        batch=1,
        lq=37,
        lk=83,
        heads=(2, 0, 2),
        head_dim=64,
        value_head_dim=64,
        dtype=torch.float16,
    )
    fixtures = ("gpu_builds",)
    odd_head_dim = 128
    result_spans = ("gaps",)
    mixtures = PLAIN | OPTIONS
    overwritten = OVERWRITTEN

    @property
    def tolerance(self) -> Mapping[torch.dtype, float]:
        return TOLERANCE

    def sizes(self, row: str, changes: Changes) -> Changes:
        return {"lq": 67, "lk": 67} if row == "causal" else {}

    def run(
        self, request: pytest.FixtureRequest, promise: Callable[..., Result], *args: Any
    ) -> Result:
        if shutil.which("g++") is None:
            pytest.skip("needs g++")
        kernels = kernels_for(self.name.split("-")[1], request.getfixturevalue("gpu_builds"))
        runs = kernels.on(machine(self.order, self.together, self.races))
        return promise(PtxOps(emulated_ops(32), runs), *args)

    def reason_against(self, row: str, case: Call) -> str | None:
        return "every thread is interpreted: kernel by kernel, a call here mixes several rows"

    def in_turn(self, number: int) -> Subject:
        return replace(self, order=ORDERS[number % 3])

    def kept(self, case: Call) -> list[tuple[torch.dtype, torch.dtype]]:
        return [(case.dtype, case.dtype), (case.dtype, torch.float32)]

    def orders(self) -> Sequence[Subject]:
        """Without looking for races, in which any order is as good as another."""
        given = (("ascending", 0), ("ascending", 1), ("descending", 1))
        return [replace(self, order=o, together=n, races=False) for o, n in given]

    def lse_tolerance(self, dtype: torch.dtype) -> float:
        return 1e-6


SUBJECTS = [Executed("ptx-sm_80")]
