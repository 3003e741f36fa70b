"""The PTX that Triton makes of our kernels, executed: what a GPU is given, without one.

Our own launch code launches, Triton's own launcher passes the arguments, ``ptx`` executes. The
Hopper kernels are those in Gluon.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from native_case import (
    Case,
    assert_right,
    computed,
    make_inputs,
    new_state,
    options,
)

from usp import kernels

pytest.importorskip("triton")

import ptx
from ptx.hopper import HopperMachine
from ptx_triton import TritonOps
from triton import knobs

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
BASE = Case(
    batch=1, lq=67, lk=131, heads=(3, 1, 2), head_dim=64, value_head_dim=64, dtype=torch.bfloat16
)
needs_gluon = pytest.mark.skipif(not kernels.has_gluon(), reason="no Triton with Gluon for Hopper")
AT_ONCE = partial(HopperMachine, late_copies=False, late_products=False, order="descending")


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A kernel is compiled once here, and not by another version of anything."""
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def check(ops: TritonOps, case: Case) -> None:
    x = make_inputs(case)
    assert_right(case, x, computed(case, x, ops), TOLERANCE[case.dtype], lse=1e-5)


CASES: dict[str, dict[str, Any]] = {
    "causal": {"span": "causal", "prior_keys": 19},
    "gaps": {"span": "gaps", "head_dim": 128, "value_head_dim": 128, "dtype": torch.float16},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", ["sm_80", "sm_90"])
def test_equals_dense_attention(family: str, name: str) -> None:
    ops = TritonOps(family)
    check(ops, replace(BASE, **CASES[name]))
    assert set(ops.launched) == {"forward_kernel", "keys_kernel", "queries_kernel"}
