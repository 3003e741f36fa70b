"""The compiled CPU ops beside the contract: threads, rounding, delta of fp32 and fp64, torch's own
checks of an op, ``torch.compile``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_call import Call, make_inputs, new_state, options
from promises import answers
from subjects.native import BF16_ONLY, CAPABILITIES, COMPLETE, SUBJECTS, Native, running_on
from torch import Tensor

from usp.ops import native as ops

pytestmark = pytest.mark.skipif(
    ops.load_error() is not None, reason=f"compiled ops: {ops.load_error()}"
)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("bias", [None, "1HQK", "B11K"])
def test_any_number_of_threads(
    threads: int, bias: str | None, request: pytest.FixtureRequest
) -> None:
    case = Call(batch=3, lq=200, lk=300, span="causal", bias=bias)
    got = replace(COMPLETE, threads=threads).run(request, answers, case)
    COMPLETE.assert_right(case, got)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
@pytest.mark.parametrize("span", ["all", "sinks_and_registers"])
@pytest.mark.parametrize("prior_keys", [0, 13])
def test_more_keys_than_are_held(
    prior_keys: int, span: str, subject: Native, request: pytest.FixtureRequest
) -> None:
    """They are held in turn, or move along with the rows, but for some seen by all or by few."""
    dtype = torch.bfloat16 if subject.capability in BF16_ONLY else torch.float32
    shape = {"batch": 1, "lq": 197, "lk": 1500, "heads": (3, 1, 2), "prior_keys": prior_keys}
    case = replace(subject.base, span=span, dtype=dtype, **shape)
    subject.assert_right(case, subject.run(request, answers, case))


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
@pytest.mark.parametrize("prior_keys", [0, 13])
def test_rows_that_see_all_ride_along(
    prior_keys: int, subject: Native, request: pytest.FixtureRequest
) -> None:
    dtype = torch.bfloat16 if subject.capability in BF16_ONLY else torch.float32
    case = replace(
        subject.base,
        lq=401,
        lk=733,
        heads=(3, 1, 1),
        span="sinks_and_registers",
        bias="B1QK",
        bias_holes=True,
        alibi="1H",
        softcap=2.0,
        dropout_p=0.15,
        dtype=dtype,
        prior_keys=prior_keys,
        value_head_dim=37,
    )
    subject.assert_right(case, replace(subject, threads=3).run(request, answers, case))


# Powers of two step through every exponent of a half, numbers around them round both ways.
def test_results_round_as_torch_does() -> None:
    steps = torch.arange(-40, 20, dtype=torch.float32)
    values = torch.cat([2**steps * f for f in (1, 1.0004, 1.00049, 1.0005, 1.0037, 1.004, 1.9999)])
    values = torch.cat([values, -values, torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])])
    count = len(values)
    case = Call(heads=(1, 0, 1), dtype=torch.float16)
    for dtype in (torch.float16, torch.bfloat16):
        q, k = (torch.zeros(1, n, 1, 16, dtype=dtype) for n in (count, 1))
        out = values.repeat_interleave(16).view(1, count, 1, 16)
        lse, nothing = torch.zeros(1, 1, count), torch.zeros(count, dtype=torch.int32)
        for capability in CAPABILITIES:
            with running_on(capability, 1):
                result = torch.zeros_like(out, dtype=dtype)
                scalars = (0, 1, 1, case.head_dim**-0.5, 0.0, 0.0, 0)
                args = (q, k, k, nothing, nothing, None, None, None, None, *scalars)
                torch.ops.usp.attention_forward(*args, out, lse.clone(), result)
            torch.testing.assert_close(result, out.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 67, 3, 40), (1, 64, 1, 7), (1, 0, 2, 8), (2, 130, 1, 128)])
def test_delta(shape: tuple[int, ...], dtype: torch.dtype, capability: str) -> None:
    torch.manual_seed(4)
    batch, rows, heads, _ = shape
    dout = torch.randn(batch, heads, rows, shape[3]).to(dtype).transpose(1, 2)
    out = torch.randn(shape).to(dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    result = torch.full((batch, heads, rows), torch.nan, dtype=acc)
    with running_on(capability, 2):
        torch.ops.usp.attention_delta(dout, out, result)
    exact = (dout.double() * out.double()).sum(-1).transpose(1, 2)
    bound = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=bound * shape[3])


ALONE = [
    Call(),
    Call(span="bands_at_once", dtype=torch.bfloat16, heads=(3, 1, 2), softcap=2.0, layout="sliced"),
    Call(3, 5, 2, dtype=torch.float64, span="causal", value_head_dim=7, layout="heads_first"),
]


@pytest.mark.parametrize("case", ALONE)
@pytest.mark.parametrize("dlse", [False, True])
def test_a_block_that_is_alone_is_one_op_to_the_bit(case: Call, dlse: bool) -> None:
    x = make_inputs(case)
    shared = options(case, x, slice(None), masked=True)
    (_, lse), out = new_state(case), torch.empty_like(x.dout, memory_format=torch.contiguous_format)
    torch.ops.usp.attention_forward(x.q, x.k, x.v, *shared, None, lse, out)
    delta = torch.empty_like(lse)
    torch.ops.usp.attention_delta(x.dout, out, delta)
    sums = [torch.empty(t.shape, dtype=t.dtype) for t in (x.q, x.k, x.v)]
    torch.ops.usp.attention_backward(
        *(x.dout, x.q, x.k, x.v, delta - x.dlse if dlse else delta, lse),
        *(*shared, *sums, None, True),
    )
    some = [shared[i] for i in (0, 1, 6, 8, 9, 10)]
    # heads apart in memory, and a gradient of the LSE that is, too
    dout, q, k, v = (t.mT.contiguous().mT for t in (x.dout, x.q, x.k, x.v))
    given = (q, k, v, *some)
    saved = (dout, x.dlse.mT.contiguous().mT if dlse else None, q, k, v, out, lse, *some)
    forward, backward = torch.ops.usp.attention_once, torch.ops.usp.attention_once_backward
    for found, wanted in zip((*forward(*given), *backward(*saved)), (out, lse, *sums), strict=True):
        assert torch.equal(found, wanted) and found.is_contiguous()
    torch.library.opcheck(forward.default, given)
    torch.library.opcheck(backward.default, saved)


def samples() -> list[tuple[Any, tuple[Any, ...]]]:
    found = []
    for case in (Call(), Call(bias="B1QK", span="causal", alibi="1H", dropout_p=0.1, softcap=3.0)):
        x = make_inputs(case)
        out, lse = new_state(case)
        shared = options(case, x, slice(None), masked=True)
        found.append((torch.ops.usp.attention_forward.default, (x.q, x.k, x.v, *shared, out, lse)))
        grads = [None if t is None else torch.zeros_like(t) for t in (x.q, x.k, x.v, x.bias)]
        lse = torch.randn_like(lse)
        saved = (x.dout, x.q, x.k, x.v, torch.randn_like(lse), lse)
        found.append((torch.ops.usp.attention_backward.default, (*saved, *shared, *grads)))
    return found


@pytest.mark.parametrize("sample", range(4))
def test_opcheck(sample: int) -> None:
    op, args = samples()[sample]
    torch.library.opcheck(op, args)


def test_compiles_in_one_graph() -> None:
    case = Call(span="causal")
    x = make_inputs(case)
    shared = options(case, x, slice(None), masked=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = new_state(case)
        torch.ops.usp.attention_forward(q, k, v, *shared, out, lse)
        return out * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.q, x.k, x.v), attend(x.q, x.k, x.v))
