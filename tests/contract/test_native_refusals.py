"""What the compiled CPU ops refuse, with both numbers in the message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_call import Call, make_inputs, new_state, options

from usp.ops import native as ops

pytestmark = pytest.mark.skipif(
    ops.load_error() is not None, reason=f"compiled ops: {ops.load_error()}"
)

REFUSALS: dict[str, tuple[str, Any, str]] = {
    "batch": ("k", lambda k: k[:1], r"k: dim 0 \(B\) is 1, but q has B = 2"),
    "head_dim": ("k", lambda k: k[..., :7], r"k: dim 3 \(D\) is 7, but q has D = 16"),
    "keys": ("v", lambda v: v[:, :5], r"v: dim 1 \(Lk\) is 5, but k has Lk = 131"),
    "dims": ("q", lambda q: q[0], r"q has 3 dims, expected 4 \(B, Lq, H, D\)"),
    "dtype": ("v", lambda v: v.double(), "v is Double, expected Float"),
    "integers": ("q", lambda q: q.int(), "q is Int; expected float32"),
    "last dim": ("q", lambda q: q.mT.contiguous().mT, "q has stride 4 in its last dim, expected 1"),
    "bias shape": ("bias", torch.zeros(2, 3, 1, 131), r"bias: dim 1 \(H\) is 3.*H = 4.*or 1"),
    "bias dtype": ("bias", torch.zeros(1, 1, 1, 131).double(), "bias is Double, expected Float"),
    "one end": ("stop", None, "first is given, stop is None"),
    "span length": ("stop", lambda s: s[:-1], r"stop: dim 0 \(Lq\) is 66, but q has Lq = 67"),
    "span dtype": ("stop", lambda s: s.long(), "stop is Long, expected Int"),
    "span below": ("first", lambda f: f - 1, r"first\[0\] is -1, expected at least 0"),
    "span above": ("stop", lambda s: s + 99, r"stop\[-1\] is 166, but k has Lk = 131"),
    "bands": ("stop", lambda s: s[None], r"stop has 2 dims, expected 1 \(Lq\)"),
    "slopes": ("alibi_slopes", torch.zeros(3, 4), r"alibi_slopes: dim 0 \(B\) is 3"),
    "positions": ("dropout_p", 0.1, "q_pos and k_pos are needed"),
    "dropout": ("dropout_p", 1.0, r"dropout_p is 1, expected \[0, 1\)"),
    "softcap": ("softcap", -1.0, "softcap is -1"),
    "heads": ("num_heads", 3, "H 4 exceeds num_heads 3"),
    "groups": ("group_size", 4, "touch 1 key heads, but k has G = 2"),
    "no group": ("group_size", 0, "group_size is 0"),
    "out dtype": ("out", lambda o: o.bfloat16(), "out is BFloat16, expected Float"),
    "out strides": ("out", lambda o: o.mT.contiguous().mT, "out is not contiguous"),
    "no place": ("out", None, "out and result are both None"),
    "result dtype": ("result", torch.zeros(2, 67, 4, 16).half(), "result is Half, expected Float"),
    "result shape": ("result", torch.zeros(2, 67, 4, 9), r"result: dim 3 \(Dv\) is 9"),
    "lse shape": ("lse", lambda x: x[..., :5], r"lse: dim 2 \(Lq\) is 5, but q has Lq = 67"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_refuses_with_both_numbers(refusal: str) -> None:
    name, value, message = REFUSALS[refusal]
    case = Call(span="causal")
    x = make_inputs(case)
    values = (x.q, x.k, x.v, *options(case, x, slice(None), masked=True), *new_state(case), None)
    arguments = torch.ops.usp.attention_forward.default._schema.arguments
    args = {a.name: value for a, value in zip(arguments, values, strict=True)}
    args[name] = value(args[name]) if callable(value) else value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.usp.attention_forward(*args.values())


def test_refuses_a_gradient_of_another_shape_than_the_bias() -> None:
    case = Call(bias="11QK")
    x = make_inputs(case)
    _, lse = new_state(case)
    saved = (x.dout, x.q, x.k, x.v, lse, lse)
    shared = options(case, x, slice(None), masked=True)
    sums = [torch.zeros_like(t) for t in (x.q, x.k, x.v)]
    with pytest.raises(RuntimeError, match="dbias: dim 1 is 4, but bias has 1"):
        torch.ops.usp.attention_backward(*saved, *shared, *sums, torch.zeros(1, 4, 67, 131))
    shared[2] = None
    with pytest.raises(RuntimeError, match="dbias is given but bias is None"):
        torch.ops.usp.attention_backward(*saved, *shared, *sums, torch.zeros(1, 1, 67, 131))


def test_an_unknown_capability_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USP_CPU_CAPABILITY", "sse9")
    case = Call()
    x = make_inputs(case)
    shared = options(case, x, slice(None), masked=True)
    with pytest.raises(RuntimeError, match="USP_CPU_CAPABILITY is 'sse9'; expected default, avx2"):
        torch.ops.usp.attention_forward(x.q, x.k, x.v, *shared, *new_state(case))
