"""Whoever can merge, on rows that have made others fail; the formula's gradients."""

from __future__ import annotations

import pytest
import torch
from move_ops import names
from pool import Pool
from torch import Tensor

from usp.ops import native
from usp.ops.merge import MERGERS, merge, merge_into

State = tuple[Tensor, Tensor, Tensor, Tensor]
B, H, DV = 2, 3, 5
INF = float("inf")
# lse of both sides
ROWS = {
    "near": (0.3, -1.1),
    "hidden_there": (1.7, -INF),
    "hidden_here": (-INF, 1.7),
    "hidden": (-INF, -INF),
    "opposite": (2.5, 2.5),
    "below_by_far": (400.0, 311.0),
    "above_by_far": (-400.0, 400.0),
    "low": (-3e4, -3e4),
}
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
EPS = {torch.float64: 1e-15, torch.float32: 2e-7}


def parts(dtype: torch.dtype, more_dtype: torch.dtype) -> State:
    """A row of each kind, twice three heads of it; channel 2 is 0 in all keys."""
    generator = torch.Generator().manual_seed(1)
    out = torch.randn(B, len(ROWS), H, DV, generator=generator, dtype=more_dtype).to(dtype)
    more_out = torch.randn(B, len(ROWS), H, DV, generator=generator, dtype=more_dtype)
    lse, more_lse = torch.tensor(list(ROWS.values()), dtype=dtype).T
    kinds = list(ROWS)
    more_out[:, kinds.index("opposite")] = -out[:, kinds.index("opposite")].to(more_dtype)
    out[..., 2] = more_out[..., 2] = 0
    for x, at in ((out, lse), (more_out, more_lse)):
        x[:, at == -INF] = 0
    wide = (B, H, len(ROWS))
    return out, lse.expand(wide).clone(), more_out, more_lse.expand(wide).clone()


def expected(state: State) -> tuple[Tensor, Tensor]:
    """In fp64, by sigmoid and logaddexp: nothing of the formula is used."""
    out, lse, more_out, more_lse = (x.double() for x in state)
    share, more = (
        torch.sigmoid(a - b).nan_to_num(0).transpose(1, 2)[..., None]
        for a, b in ((lse, more_lse), (more_lse, lse))
    )
    return share * out + more * more_out, torch.logaddexp(lse, more_lse)


def merged_by(name: str, state: State) -> tuple[Tensor, Tensor]:
    """Here, or on a worker."""
    out, lse, more_out, more_lse = (x.clone() for x in state)
    assert MERGERS[name].takes(out, lse, more_out, more_lse)
    MERGERS[name].merge_into(out, lse, more_out, more_lse)
    return out, lse


@pytest.mark.parametrize(("dtype", "more_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("name", names(MERGERS))
def test_each_is_the_formula(
    name: str, dtype: torch.dtype, more_dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    state = parts(dtype, more_dtype)
    if name == "triton":
        if dtype == torch.float64:
            pytest.skip("its state is fp32")
        pool: Pool = request.getfixturevalue("interpreter")
        ((out, lse),) = pool.run(merged_by, name, state, ranks=1)
    elif name == "native" and native.load_error() is not None:
        pytest.skip(f"compiled ops: {native.load_error()}")
    else:
        out, lse = merged_by(name, state)
    want, want_lse = expected(state)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=4 * EPS[dtype])
    torch.testing.assert_close(lse.double(), want_lse, rtol=EPS[dtype], atol=EPS[dtype])
    kinds = list(ROWS)
    assert (out[..., 2] == 0).all() and (out[:, kinds.index("opposite")] == 0).all()
    assert (out[:, kinds.index("hidden")] == 0).all()
    row = kinds.index("hidden_there")
    assert torch.equal(out[:, row], state[0][:, row])
    assert torch.equal(lse[:, :, row], state[1][:, :, row])


def test_one_that_takes_them_is_always_found() -> None:
    """A state that no kernel takes: bf16, its last dim not contiguous."""
    out, lse, more_out, more_lse = parts(torch.float32, torch.bfloat16)
    askew = out.bfloat16().transpose(0, 3).contiguous().transpose(0, 3)
    state = askew, lse, more_out, more_lse
    assert [name for name in MERGERS if MERGERS[name].takes(*state)] == ["torch"]
    want, want_lse = expected((askew.clone(), *(x.clone() for x in state[1:])))
    merge_into(*state)
    torch.testing.assert_close(askew.double(), want, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-7, atol=2e-7)


def test_gradients_of_the_formula() -> None:
    """With a random cotangent; what is hidden has gradients of 0."""
    state = parts(torch.float64, torch.float64)
    seen = [kind for kind, lses in ROWS.items() if -INF not in lses]
    rows = [list(ROWS).index(kind) for kind in seen]
    some = [x[:1, rows, :1] if x.dim() == 4 else x[:1, :1, rows] for x in state]
    assert torch.autograd.gradcheck(merge, [x.clone().requires_grad_() for x in some])
    inputs = [x.clone().requires_grad_() for x in state]
    results = merge(*inputs)
    dout, dlse = (torch.randn_like(x) for x in results)
    seen_lse = torch.where(results[1] == -INF, 0, results[1])
    grads = torch.autograd.grad((results[0] * dout).sum() + (seen_lse * dlse).sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    for grad, grad_lse, lse in ((grads[0], grads[1], state[1]), (grads[2], grads[3], state[3])):
        hidden = lse == -INF
        assert (grad_lse[hidden] == 0).all() and (grad[hidden.transpose(1, 2)] == 0).all()
