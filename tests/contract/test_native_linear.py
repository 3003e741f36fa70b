"""The compiled CPU kernels of linear attention equal the recurrence, token by token in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from guarded import assert_untouched, guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_walks import Walk, assert_walk, walked
from subjects.native import DTYPES, of_this_machine, running_on
from torch import Tensor

from usp.linear_attention import native
from usp.linear_attention.kernels import Tokens, Traits
from usp.ops import native as ops

pytestmark = pytest.mark.skipif(
    ops.load_error() is not None, reason=f"compiled ops: {ops.load_error()}"
)
# States and products are fp32 whatever the inputs are; of half precision results are rounded.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
LENGTHS = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97)


@dataclass(frozen=True)
class Case(Walk):
    """A walk over a rank's tokens.

    Attributes:
        level: The instruction set.
    """

    level: str = "default"
    threads: int = 1
    segment: int = 64
    dtype: torch.dtype = torch.float64


def answers(case: Case) -> dict[str, Tensor]:
    with running_on(case.level, case.threads), mock.patch.object(native, "SEGMENT", case.segment):
        return walked(native, case)


def judge(case: Case) -> None:
    assert_walk(case, answers(case), TOLERANCE)


@settings(max_examples=max(settings.default.max_examples // 2, 1))
@given(
    st.builds(
        Case,
        level=st.sampled_from(of_this_machine()),
        threads=st.integers(1, 5),
        segment=st.sampled_from((32, 64, 1024)),
        batch=st.integers(1, 2),
        length=st.sampled_from(LENGTHS),
        heads=st.sampled_from([(1, 1, 1), (3, 3, 3), (1, 1, 3), (4, 2, 1), (2, 1, 2)]),
        dims=st.tuples(st.integers(1, 40), st.integers(1, 40)),
        g=st.sampled_from([None, "blh", "1lh", "1l1", "10h", "101", "blhd", "10hd", "1l1d"]),
        strength=st.sampled_from([0.01, 1.0, 1000.0, float("inf")]),
        fused=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 99),
    )
)
def test_walks_equal_the_recurrence(case: Case) -> None:
    judge(case)


@pytest.mark.parametrize("g", ["blh", "blhd"])
@pytest.mark.parametrize("level", of_this_machine())
def test_every_level(level: str, g: str) -> None:
    wide = {"dims": (67, 33), "strength": 0.1, "dtype": torch.float32, "g": g}
    judge(Case(level=level, threads=2, length=99, heads=(1, 1, 2), **wide))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strong_decays_a_channel(dtype: torch.dtype) -> None:
    """Up to 20 a token: differences of sums over a chunk would overflow, or lose all digits."""
    judge(Case(length=131, dims=(64, 33), g="blhd", strength=20.0, dtype=dtype, segment=256))


def test_the_same_threads_give_the_same_bits() -> None:
    case = Case(level=of_this_machine()[-1], threads=3, batch=1, length=301, dtype=torch.bfloat16)
    first = answers(case)
    for name, x in answers(case).items():
        assert torch.equal(x, first[name]), name


def test_decays_above_1_overflow_to_infinity() -> None:
    """As in plain torch, and never to something finite."""
    x, g = torch.ones(1, 3, 1, 1), torch.full((1, 3, 1), 60.0)
    with running_on(of_this_machine()[-1]):
        out, _, _ = native.forward(Tokens(x, x, x, g), torch.ones(1, 1, 1, 1), (), False)
    assert out[0, 0].item() == pytest.approx(torch.tensor(60.0).exp().item())
    assert out.flatten()[1:].isinf().all()


def written(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """Results of the ops, which lie inside of larger memory."""
    (q, k, v, g), before, dout, behind = case.inputs()
    b, n, h, (d, e) = case.batch, case.length, max(case.heads), case.dims
    rooms: dict[str, tuple[Tensor, Tensor]] = {}

    def room(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        rooms[name] = guarded(torch.Size(shape), float("nan"), dtype)
        return rooms[name][0]

    kept = room("kept", -(-n // case.segment), b, h, d, e)
    state, gradient = room("state", 1, b, h, d, e), room("gradient", 1, b, h, d, e)
    state.copy_(before)
    gradient.copy_(behind)
    out = room("out", b, n, h, e, dtype=case.dtype)
    torch.ops.usp.linear_forward(q, k, v, g, case.segment, state, kept, out)
    shapes = zip(("dq", "dk", "dv"), (d, d, e), strict=True)
    found = [room(name, b, n, h, dim, dtype=case.dtype) for name, dim in shapes]
    assert g is not None
    dg = room("dg", b, n, h, *g.shape[3:])
    torch.ops.usp.linear_backward(dout, q, k, v, g, case.segment, kept, gradient, *found, dg)
    return rooms


@pytest.mark.parametrize("g", ["blh", "blhd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(5, 7), (48, 64)])
def test_nothing_else_is_written(dims: tuple[int, int], dtype: torch.dtype, g: str) -> None:
    case = Case(length=77, dims=dims, dtype=dtype, g=g)
    for level in of_this_machine():
        with running_on(level):
            for name, (inside, around) in written(case).items():
                assert not inside.isnan().any(), name
                assert_untouched(around, inside)


REFUSALS: dict[str, tuple[str, Any, str]] = {
    "heads": ("k", torch.zeros(2, 9, 3, 5), "k has 3 heads, no divisor of 4"),
    "head_dim": ("k", torch.zeros(2, 9, 4, 6), r"k: dim 3 \(D\) is 6, but states has D = 5"),
    "tokens": ("v", torch.zeros(2, 8, 4, 7), r"v: dim 1 \(L\) is 8, but q has L = 9"),
    "dtype": ("q", torch.zeros(2, 9, 4, 5).half(), "q is Half, expected Float"),
    "logs": ("g", torch.zeros(2, 9, 3), r"g: dim 2 \(H\) is 3.*H = 4 \(or 1"),
    "channels": ("g", torch.zeros(2, 9, 4, 6), r"g: dim 3 \(D\) is 6, but states has D = 5"),
    "strides": ("g", torch.zeros(2, 9, 5, 4).mT, "g has stride 4 in its last dim, expected 1"),
    "dtype of logs": ("g", torch.zeros(2, 9, 4).double(), "g is Double, expected Float"),
    "segment": ("segment", 48, "segment is 48, expected a multiple of 32"),
    "no segment": ("segment", 0, "segment is 0, expected a multiple of 32"),
    "kept": ("kept", torch.zeros(2, 2, 4, 5, 7), "kept has 2 segments, expected 1"),
    "no parts": ("states", torch.zeros(0, 2, 4, 5, 7), "states has 0 parts"),
    "no result": ("out", None, "q and out come together"),
    "no values": ("v", None, "k and v are needed"),
    "result": ("out", torch.zeros(2, 9, 4, 7).half(), "out is Half, expected Float"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_linear_forward_refuses_with_both_numbers(refusal: str) -> None:
    name, value, message = REFUSALS[refusal]
    x, v = torch.zeros(2, 9, 4, 5), torch.zeros(2, 9, 4, 7)
    args = {"q": x, "k": x, "v": v, "g": torch.zeros(2, 9, 4), "segment": 64}
    args |= {"states": torch.zeros(1, 2, 4, 5, 7), "kept": None, "out": torch.zeros(2, 9, 4, 7)}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.usp.linear_forward(*(args | {name: value}).values())


def test_linear_backward_refuses_a_part_of_its_results() -> None:
    x, states = torch.zeros(2, 9, 4, 5), torch.zeros(1, 2, 4, 5, 5)
    with pytest.raises(RuntimeError, match="k, v, kept, dq, dk and dv come together"):
        torch.ops.usp.linear_backward(x, x, x, x, None, 64, None, states, x, None, None, None)
    with pytest.raises(RuntimeError, match="dg is given, but g or dq is None"):
        dg = torch.zeros(2, 9, 4)
        none = (None,) * 3
        torch.ops.usp.linear_backward(x, x, None, None, None, 64, None, states, *none, dg)


def test_reasons_against() -> None:
    traits = Traits(torch.device("cpu"), torch.float32, (5, 7), "channels", True)
    assert native.reasons_against(traits) == ("it has no kernels for the delta rule",)
    other = Traits(torch.device("meta"), torch.float32, (5, 7))
    assert native.reasons_against(other) == ("its kernels take CPU tensors, q is on meta",)
