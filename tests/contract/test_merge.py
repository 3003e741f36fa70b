"""``usp::state_merge``: the compiled merge of a partial softmax, against the one formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from move_checks import TOLERANCE, B, H, L, assert_merged, parts
from move_ops import SUBJECTS, implementation
from torch import Tensor

import usp
from usp.ops import native as ops
from usp.ops.merge import MERGERS, merge
from usp.testing import dense_attention

DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]


@pytest.fixture(scope="module", params=SUBJECTS)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return implementation(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("head_dim", [13, 40, 272])  # by numbers, by vectors, in several rounds
@pytest.mark.parametrize(("dtype", "more_dtype"), DTYPES)
def test_it_is_the_formula(
    kernels: Any, dtype: torch.dtype, more_dtype: torch.dtype, head_dim: int
) -> None:
    out, lse, more_out, more_lse = parts(dtype, more_dtype, head_dim)
    if dtype == torch.float64 and kernels is not torch.ops.usp:  # the GPU's state is fp32
        with pytest.raises(RuntimeError, match="out is Double, expected Float"):
            kernels.state_merge(out, lse, more_out, more_lse)
        return
    want = merge(*(x.double() for x in (out, lse, more_out, more_lse)))
    kept = more_out.clone(), more_lse.clone()
    kernels.state_merge(out, lse, more_out, more_lse)
    assert_merged(out, lse, *want)
    assert torch.equal(more_out, kept[0])
    assert torch.equal(more_lse, kept[1])


@pytest.mark.parametrize(("dtype", "more_dtype"), DTYPES[1:])
@pytest.mark.parametrize("head_dim", [13, 16])
def test_strided_views_are_updated_in_place(
    kernels: Any, dtype: torch.dtype, more_dtype: torch.dtype, head_dim: int
) -> None:
    """Some rows of a state, and a result whose heads come first, as libraries give it."""
    out, lse, more_out, more_lse = parts(dtype, more_dtype, head_dim)
    want = merge(*(x.double() for x in (out, lse, more_out, more_lse)))
    rows = slice(3, 3 + L)
    whole_out = torch.full((B, L + 7, H, head_dim), torch.nan, dtype=dtype)
    whole_lse = torch.full((B, H, L + 7), torch.nan, dtype=dtype)
    whole_out[:, rows], whole_lse[:, :, rows] = out, lse
    heads_first = more_out.transpose(1, 2).contiguous().transpose(1, 2)
    rows_first = more_lse.transpose(1, 2).contiguous().transpose(1, 2)
    kernels.state_merge(whole_out[:, rows], whole_lse[:, :, rows], heads_first, rows_first)
    assert_merged(whole_out[:, rows], whole_lse[:, :, rows], *want)
    untouched = [*range(3), *range(3 + L, L + 7)]
    assert whole_out[:, untouched].isnan().all()
    assert whole_lse[:, :, untouched].isnan().all()


@pytest.mark.parametrize("far", [0, 1, 2])
@pytest.mark.parametrize("head_dim", [13, 16])
def test_elements_past_2_to_the_31(kernels: Any, head_dim: int, far: int) -> None:
    """A partial result of which only the pages that are used come into being."""
    out, lse, more_out, more_lse = parts(torch.float32, torch.bfloat16, head_dim)
    index = (slice(None), slice(9, 18), slice(None, 3))
    out, more_out = out[index].contiguous(), more_out[index]
    lse, more_lse = (x[:, :3, 9:18].contiguous() for x in (lse, more_lse))
    want = merge(*(x.double() for x in (out, lse, more_out, more_lse)))
    gap = 2**31 // (out.shape[far] - 1) + 16
    strides = [32 * 32, 32, 32 * 512, 1]
    strides[far] = gap
    memory = torch.empty(2**31 + 2**16, dtype=torch.bfloat16)
    far_away = memory.as_strided(more_out.shape, strides).copy_(more_out)
    kernels.state_merge(out, lse, far_away, more_lse)
    assert_merged(out, lse, *want)


def test_two_halves_are_the_whole(kernels: Any) -> None:
    """Against dense attention: nothing of the formula above is used."""
    dtype = torch.float64 if kernels is torch.ops.usp else torch.float32
    generator = torch.Generator().manual_seed(7)
    q, k, v = (
        torch.randn(1, n, 3, 8, generator=generator, dtype=torch.float64) for n in (17, 29, 29)
    )
    want_out, want_lse = dense_attention(q, k, v)
    out, lse = (x.to(dtype) for x in dense_attention(q, k[:, :11], v[:, :11]))
    more_out, more_lse = (x.to(dtype) for x in dense_attention(q, k[:, 11:], v[:, 11:]))
    kernels.state_merge(out, lse, more_out, more_lse)
    assert (out - want_out).abs().max() <= 2 * TOLERANCE[dtype]
    assert (lse - want_lse).abs().max() <= 8 * TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0)])
def test_nothing_is_merged_with_nothing(kernels: Any, shape: tuple[int, ...]) -> None:
    out, lse = torch.zeros(shape), torch.zeros(shape[0], shape[2], shape[1])
    kernels.state_merge(out, lse, out.clone(), lse.clone())
    assert lse.numel() == 0 or (lse - torch.tensor(2.0).log()).abs().max() < 1e-6


def test_refusals(kernels: Any) -> None:
    out, lse = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 3)
    merge = kernels.state_merge
    with pytest.raises(RuntimeError, match=r"more_out: dim 3 \(Dv\) is 6, but out has Dv = 5"):
        merge(out, lse, torch.zeros(2, 3, 4, 6), lse)
    with pytest.raises(RuntimeError, match=r"more_lse: dim 2 \(L\) is 4, but out has L = 3"):
        merge(out, lse, out, torch.zeros(2, 4, 4))
    with pytest.raises(RuntimeError, match="more_out is Double, but out is Float"):
        merge(out, lse, out.double(), lse)
    with pytest.raises(RuntimeError, match="out is BFloat16, expected Float"):
        merge(out.bfloat16(), lse, out, lse)
    with pytest.raises(RuntimeError, match="more_lse is Double, expected Float"):
        merge(out, lse, out, lse.double())
    with pytest.raises(RuntimeError, match=r"more_out has stride 4 in its last dim, expected 1"):
        merge(out, lse, torch.zeros(2, 3, 5, 4).transpose(2, 3), lse)


def test_what_a_library_returns_is_joined_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    implementation("cpu", tmp_path)
    generator = torch.Generator().manual_seed(11)
    q, k, v = (torch.randn(1, 101, 3, 16, generator=generator) for _ in range(3))
    options: dict[str, Any] = {"window_size": (40, 3), "backend": "sdpa"}
    joined: list[Tensor] = []

    def noted(out: Tensor, *rest: Tensor) -> None:
        joined.append(out)
        native.merge_into(out, *rest)

    native = MERGERS["native"]
    monkeypatch.setitem(MERGERS, "native", native._replace(merge_into=noted))
    out = usp.long_context_attention(q, k, v, **options)
    assert joined
    joined.clear()
    monkeypatch.setattr(ops, "is_there", lambda name, device_type: False)
    plain = usp.long_context_attention(q, k, v, **options)
    assert not joined
    want, _ = dense_attention(q, k, v, window_size=(40, 3))
    assert (out - want).abs().max() < 2e-6
    assert (plain - want).abs().max() < 2e-6


def test_what_it_cannot_join_is_left_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    implementation("cpu", tmp_path)
    out, lse = torch.zeros(2, 3, 4, 6), torch.zeros(2, 4, 3)

    def takes(out: Tensor, more_out: Tensor) -> bool:
        return MERGERS["native"].takes(out, lse, more_out, lse)

    assert takes(out, out)
    assert takes(out, out.bfloat16())
    assert takes(out.double(), out.double())
    assert not takes(out.bfloat16(), out.bfloat16())
    assert not takes(out.double(), out)
    assert not takes(out, out.double())
    assert not takes(out, torch.zeros(2, 3, 6, 4).transpose(2, 3))
    assert not takes(out.to("meta"), out.to("meta"))
    monkeypatch.setattr(ops, "is_there", lambda name, device_type: True)
    assert takes(out.to("meta"), out.to("meta"))
    assert not takes(out.to("meta").double(), out.to("meta").double())


def test_opcheck(tmp_path: Path) -> None:
    kernels = implementation("cpu", tmp_path)
    out, lse, more_out, more_lse = parts(torch.float32, torch.bfloat16)
    torch.library.opcheck(kernels.state_merge.default, (out, lse, more_out, more_lse))
