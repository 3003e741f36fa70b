"""The Triton backend through the normal door, on meshes of gloo workers, in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case
from judge import judge
from pool import Pool

from usp import kernels
from usp.backends import triton
from usp.planning.problem import Traits

MESH = Case(
    ulysses=2,
    ring=2,
    backend="triton",
    dtype="float32",
    seq_len=43,
    heads=3,
    kv_heads=3,
    head_dim=8,
    value_dim=8,
)
CASES: dict[str, dict[str, Any]] = {
    "zigzag": {"layout": "zigzag", "causal": True},
    "window_of_a_zigzag": {"layout": "zigzag", "causal": True, "window": (5, 0)},
    "striped_lse": {"layout": "striped", "causal": True, "return_lse": True},
    "shared_key_heads": {"heads": 6, "kv_heads": 2, "transport": "allgather"},
    "documents": {"layout": "documents", "cu_seqlens": (0, 0, 9, 43), "causal": True},
    "padding_and_bias": {"padding": 0.4, "bias": "hq", "bias_hides": 0.2, "kv_heads": 1},
    "dropout": {"dropout_p": 0.3, "alibi": "h", "softcap": 3.0, "return_lse": True},
    "scale_of_0": {"softmax_scale": 0.0},
    "negative_scale": {"softmax_scale": -0.4, "causal": True},
    "bfloat16": {"dtype": "bfloat16", "causal": True, "layout": "zigzag", "strided": "heads"},
    "float16": {"dtype": "float16", "bias": "b", "batch": 2, "bias_dtype": "float32"},
    "cross": {"key_len": 7, "causal": True, "return_lse": True},
    "one_device": {"ulysses": 1, "ring": 1, "on_mesh": False, "causal": True, "strided": "last"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_mesh_equals_dense_attention(name: str, interpreter: Pool) -> None:
    judge(replace(MESH, **CASES[name]), interpreter)


def reasons(**changes: Any) -> tuple[str, ...]:
    traits = {"device_type": "cpu", "dtype": torch.float32, "head_dim": 8, "value_head_dim": 8}
    return triton.reasons_against(Traits(**{**traits, "softmax_scale": 1.0, **changes}))


def reasons_on_a_worker() -> dict[str, tuple[str, ...]]:
    return {
        "fine": reasons(),
        "fp64": reasons(dtype=torch.float64),
        "wide": reasons(value_head_dim=257),
        "gpu": reasons(device_type="cuda"),
    }


def test_it_says_what_it_cannot_do(interpreter: Pool) -> None:
    (said,) = interpreter.run(reasons_on_a_worker, ranks=1)
    assert said["fine"] == ()
    assert "float64" in said["fp64"][0]
    assert "257" in said["wide"][0] and "256" in said["wide"][0]
    assert "cuda" in said["gpu"][0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    assert kernels.unavailable() in reasons()
    assert "Triton" in str(kernels.unavailable())
