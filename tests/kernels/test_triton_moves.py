"""Kernels that move and merge: partial results into the state, heads into one message."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from cases import Case
from guarded import assert_untouched, guarded
from hypothesis import example, given, settings
from hypothesis import strategies as st
from judge import judge, run
from pool import Pool
from torch import Tensor


def merged(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """On a worker: some rows of a longer state, the others must stay."""
    from usp.kernels.state_merge import merge_into

    merge_into(out[:, 2:-1], lse[:, :, 2:-1], more_out, more_lse)
    return out, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 37, 3, 24), (1, 1, 1, 1), (1, 5, 2, 256), (0, 3, 1, 8)])
def test_merge_is_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, interpreter: Pool
) -> None:
    from usp.ops.merge import merge

    torch.manual_seed(0)
    batch, length, heads, width = shape
    out, lse = torch.randn(batch, length + 3, heads, width), torch.randn(batch, heads, length + 3)
    # as a library gives it: heads before tokens
    more_out = torch.randn(batch, heads, length, width).to(dtype).transpose(1, 2)
    more_lse = 90 * torch.randn(batch, heads, length)
    for part in (lse, more_lse):
        part.masked_fill_(torch.rand(part.shape) < 0.3, -torch.inf)
    out.masked_fill_((lse == -torch.inf).transpose(1, 2)[..., None], 0)
    more_out = more_out.masked_fill((more_lse == -torch.inf).transpose(1, 2)[..., None], torch.nan)
    ((got, got_lse),) = interpreter.run(merged, out, lse, more_out, more_lse, ranks=1)
    inside = slice(2, -1)
    wanted = out.double(), lse.double()
    parts = [x[:, inside] for x in (wanted[0],)] + [wanted[1][:, :, inside]]
    joined = merge(*parts, more_out.double().nan_to_num(), more_lse.double())
    wanted[0][:, inside], wanted[1][:, :, inside] = joined
    torch.testing.assert_close(got.double(), wanted[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got_lse.double(), wanted[1], rtol=1e-6, atol=1e-6)


def products(dout: Tensor, out: Tensor) -> Tensor:
    """On a worker: delta, and that nothing else is written."""
    from usp.kernels.attention_delta import attention_delta, launch_delta

    shape = (out.shape[0], out.shape[2], out.shape[1])
    delta, around = guarded(torch.Size(shape), torch.nan)
    launch_delta(dout, out, delta)
    assert_untouched(around, delta)
    assert torch.equal(attention_delta(dout, out), delta)
    return delta


@pytest.mark.parametrize("shape", [(2, 300, 3, 16), (1, 5, 2, 40), (3, 1, 1, 256), (1, 37, 3, 13)])
def test_delta(shape: tuple[int, ...], interpreter: Pool) -> None:
    torch.manual_seed(0)
    dout, out = torch.randn(shape).transpose(0, 1).contiguous().transpose(0, 1), torch.randn(shape)
    (delta,) = interpreter.run(products, dout, out.bfloat16(), ranks=1)
    exact = (dout.double() * out.bfloat16().double()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(delta.double(), exact, rtol=0, atol=2e-5)


def copied(source: Tensor, cuts: list[tuple[int, int]], offset: int) -> list[Tensor]:
    """On a worker: runs of heads of a tensor, one behind the other in a message."""
    from usp.kernels.pack import copy_pieces

    pieces = [source[:, :, start:stop] for start, stop in cuts]
    message = torch.ones(offset + sum(p.numel() for p in pieces), dtype=source.dtype)
    flat = message[offset:].split([p.numel() for p in pieces])
    copy_pieces(pieces, [part.view(p.shape) for part, p in zip(flat, pieces, strict=True)])
    assert (message[:offset] == 1).all()
    return list(flat)


@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 7), st.integers(1, 33)),
    cuts=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.float64]),
    heads_first=st.booleans(),
    offset=st.integers(0, 5),
)
@example(  # no stride says how long a row is
    shape=(1, 1, 1, 5), cuts=[(0, 1)], dtype=torch.bfloat16, heads_first=False, offset=0
)
def test_pieces_arrive(
    shape: tuple[int, ...],
    cuts: list[tuple[int, int]],
    dtype: torch.dtype,
    heads_first: bool,
    offset: int,
    interpreter: Pool,
) -> None:
    source = torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype)
    if heads_first:
        source = source.transpose(1, 2).contiguous().transpose(1, 2)
    cuts = [(min(cut), max(cut)) for cut in cuts]
    (got,) = interpreter.run(copied, source, cuts, offset, ranks=1)
    for part, (start, stop) in zip(got, cuts, strict=True):
        assert torch.equal(part, source[:, :, start:stop].flatten())


def counted(case: Case) -> tuple[dict[str, Tensor], int, int]:
    """On a worker: the results, and how often each kernel was called."""
    from usp.kernels import pack, state_merge

    with (
        mock.patch.object(state_merge, "merge_into", wraps=state_merge.merge_into) as merge,
        mock.patch.object(pack, "copy_pieces", wraps=pack.copy_pieces) as copy,
    ):
        return run(case), merge.call_count, copy.call_count


CASE = Case(
    ulysses=2,
    ring=2,
    backend="reference",
    dtype="float32",
    seq_len=43,
    heads=3,
    kv_heads=1,
    causal=True,
    layout="zigzag",
    head_dim=6,
    padding=0.2,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_partial_results_and_heads_pass_through_them(dtype: str, interpreter: Pool) -> None:
    case = replace(CASE, dtype=dtype, return_lse=dtype == "float32")
    judge(case, interpreter)
    for _, merges, copies in interpreter.run(counted, case, ranks=4):
        assert merges == 2  # one a step
        assert copies >= 4  # q, k, v, mask there, out and its gradients back


def test_fp64_stays_exact(interpreter: Pool) -> None:
    judge(replace(CASE, dtype="float64"), interpreter)
