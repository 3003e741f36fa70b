"""One block into the running softmax: every backend, in pieces or whole, and the merge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from usp.attention import block
from usp.backends import TABLE, Backend
from usp.ops.merge import merge
from usp.planning.heads import Heads
from usp.planning.masks.options import make_mask
from usp.planning.plan import make_plan
from usp.planning.problem import Block, Gradients, Scoring, State, Traits
from usp.planning.samples import masks_of
from usp.testing import dense_attention

ON_CPU = Traits("cpu", torch.float64, 16, 16, 0.3)
BACKENDS = [backend for backend in TABLE if not backend.reasons_against(ON_CPU)]
MASKS = [{}, {"causal": True}, {"causal": True, "window_size": (3, 0)}, {"window_size": (2, 4)}]


def blocks_of(q: Tensor, k: Tensor, v: Tensor, options: dict, pieces: int) -> list[Block]:
    """The same attention as ``pieces`` blocks of keys, as a ring of that size would see them."""
    seq_len = q.shape[1]
    masks = masks_of(make_mask(**options))
    lengths = seq_len, seq_len
    plans = [make_plan(masks, "contiguous", lengths, pieces, r) for r in range(pieces)]
    heads = Heads(0, q.shape[2], q.shape[2], q.shape[2] // k.shape[2])
    found = []
    for plan in plans:
        rows = plan.queries.tensor
        for step in plan.steps:
            (load,) = step.loads
            keys = plan.keys[step.owner].tensor[load.rows.index]
            for visit in load.visits:
                piece = Block(q[:, rows], k[:, keys], v[:, keys], visit, heads, Scoring(0.3))
                found.append((rows, keys, piece))
    return found


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.NAME)
@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("pieces", [1, 3])
def test_blocks_one_after_the_other_are_the_whole(
    backend: Backend, options: dict, pieces: int
) -> None:
    torch.manual_seed(3)
    shape = (2, 31, 6, 16)
    q, dout = torch.randn(shape).double(), torch.randn(shape).double()
    k, v = (torch.randn(2, 31, 2, 16).double() for _ in range(2))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = dense_attention(q, k, v, softmax_scale=0.3, **options)
    expected = torch.autograd.grad(out, (q, k, v), dout)
    q, k, v = (x.detach() for x in (q, k, v))
    state = block.new_state(q, 16)
    for rows, _, piece in blocks_of(q, k, v, options, pieces):
        assert state.out is not None
        part = State(state.out[:, rows].contiguous(), state.lse[:, :, rows].contiguous())
        block.attention_forward(piece, part, backend)
        state.out[:, rows], state.lse[:, :, rows] = part.out, part.lse
    torch.testing.assert_close(state.out, out, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.lse, lse, rtol=0, atol=1e-12)
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    for rows, keys, piece in blocks_of(q, k, v, options, pieces):
        saved = block.saved_for_backward(
            dout[:, rows], None, state.out[:, rows], state.lse[:, :, rows].contiguous(), backend
        )
        parts = [torch.zeros_like(x) for x in (piece.q, piece.k, piece.v)]
        block.attention_backward(piece, saved, Gradients(*parts), backend)
        for total, part, where in zip(sums, parts, (rows, keys, keys), strict=True):
            total[:, where] += part
    for got, want in zip(sums, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


finite_or_empty = st.floats(-300, 300) | st.just(float("-inf"))


@given(st.lists(st.tuples(finite_or_empty, finite_or_empty), min_size=1, max_size=5))
def test_merge_is_exact_and_never_nan(pairs: list[tuple[float, float]]) -> None:
    lse, more = torch.tensor(pairs, dtype=torch.float64).T.contiguous()[:, None, None, :]
    out, more_out = (torch.randn(1, len(pairs), 1, 4, dtype=torch.float64) for _ in range(2))
    inputs = [x.clone().requires_grad_() for x in (out, lse, more_out, more)]
    joined, joined_lse = merge(inputs[0], inputs[1], inputs[2], inputs[3])
    expected = torch.logaddexp(lse, more)
    torch.testing.assert_close(joined_lse.detach(), expected, rtol=1e-14, atol=1e-12)
    safe = torch.where(expected == -torch.inf, 0, expected)
    weights = [(x - safe).exp().transpose(1, 2)[..., None] for x in (lse, more)]
    torch.testing.assert_close(
        joined.detach(), weights[0] * out + weights[1] * more_out, rtol=1e-12, atol=1e-12
    )
    seen = torch.where(expected == -torch.inf, 0, joined_lse).sum() + joined.sum()
    for gradient in torch.autograd.grad(seen, inputs):
        assert gradient.isfinite().all()


def test_a_row_that_saw_nothing_stays_0_and_minus_infinity() -> None:
    out, lse = torch.zeros(1, 1, 1, 3), torch.full((1, 1, 1), -torch.inf)
    joined, joined_lse = merge(out, lse, out, lse)
    assert joined.eq(0).all() and joined_lse.eq(-torch.inf).all()
