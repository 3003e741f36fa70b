"""A call like one before is not checked again, and is the same call."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pool as workers
import pytest
import torch
from torch import Tensor

import usp
from usp.attention import attn_mask, hybrid, kept, request
from usp.attention.single import Single
from usp.backends import _local, native, packages
from usp.planning.masks.bands import Bands
from usp.planning.masks.mask import Mask
from usp.planning.masks.options import Window
from usp.testing import dense_attention


def qkv(length: int = 5, seed: int = 0, **more: Any) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(2, length, 2, 4, generator=random, dtype=torch.float64) for _ in range(3)]


def checks(*calls: tuple[list[Tensor], dict[str, Any]]) -> int:
    """How many of the calls are checked; each is right."""
    kept._KEPT.clear()
    with mock.patch.object(request, "check", wraps=request.check) as check:
        for tensors, options in calls:
            out = usp.long_context_attention(*tensors, **options)
            expected, _ = dense_attention(*tensors, **options)
            torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    return check.call_count


def test_the_same_kind_of_call_is_checked_once() -> None:
    options = {"causal": True, "window_size": (2, None)}
    assert checks(*((qkv(seed=seed), options) for seed in range(4))) == 1


def test_what_differs_is_checked_anew() -> None:
    slopes = torch.rand(2, dtype=torch.float64)
    calls = [
        (qkv(), {"causal": True}),
        (qkv(), {"causal": False}),
        (qkv(6), {"causal": True}),
        (qkv(), {"causal": True, "window_size": (1, None)}),
        (qkv(), {"causal": True, "cu_seqlens": (0, 3, 5)}),
        (qkv(), {"causal": True, "cu_seqlens": (0, 2, 5)}),
        (qkv(), {"causal": True, "alibi_slopes": slopes}),
        (qkv(), {"causal": True, "key_padding_mask": torch.tensor([[False] * 4 + [True]] * 2)}),
    ]
    assert checks(*calls, *calls) == len(calls)


def test_a_mask_of_values_is_known_by_them() -> None:
    """Also where it changes in place; what makes no mask is a bias, and checked once, too."""
    mask, heads = torch.ones(5, 5).tril() > 0, torch.rand(1, 2, 5, 5) > 0.3
    heads[..., 0] = True
    kept._KEPT.clear()
    with mock.patch.object(request, "check", wraps=request.check) as check:
        for given, count in ((mask, 1), (mask.clone(), 1), (heads, 2), (~mask | mask.T, 3)):
            for _ in range(2):
                out = usp.long_context_attention(*qkv(), attn_mask=given)
                bias = torch.zeros(given.shape).masked_fill(~given, -torch.inf).double()
                expected, _ = dense_attention(*qkv(), attn_bias=bias.expand(1, 2, 5, 5))
                torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
            assert check.call_count == count
        mask[3, 1] = False
        out = usp.long_context_attention(*qkv(), attn_mask=mask)
    bias = torch.zeros(1, 1, 5, 5).masked_fill(~mask, -torch.inf).double()
    torch.testing.assert_close(out, dense_attention(*qkv(), attn_bias=bias)[0])


def test_values_of_a_mask_are_looked_into_once() -> None:
    """And again where somebody who shares its memory has written to it, unseen by torch."""
    values = np.tril(np.ones((8, 8), dtype=bool))
    mask = torch.from_numpy(values)
    with mock.patch.object(attn_mask, "planned", wraps=attn_mask.planned) as planned:
        for changed, count in ((None, 1), ((5, 2), 2), ((6, 7), 3), (None, 3)):
            if changed is not None:
                values[changed] = not values[changed]
            for given in (mask, mask.clone()):
                out = usp.long_context_attention(*qkv(8), attn_mask=given)
                bias = torch.zeros(1, 1, 8, 8).masked_fill(~mask, -torch.inf).double()
                torch.testing.assert_close(out, dense_attention(*qkv(8), attn_bias=bias)[0])
            assert planned.call_count == count
        usp.long_context_attention(*qkv(8), attn_mask=mask.view(1, 1, 8, 8)[..., :8, :])
        assert planned.call_count == 3


def _on_a_mesh_of_one() -> int:
    mesh = workers.mesh(1, 1)
    kept._KEPT.clear()
    with mock.patch.object(request, "check", wraps=request.check) as check:
        found = [usp.long_context_attention(*qkv(), on, causal=True) for on in (mesh, None, mesh)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    with pytest.raises(TypeError, match="mesh must be a SequenceMesh"):
        usp.long_context_attention(*qkv(), mesh.device_mesh, causal=True)
    return check.call_count


def test_a_mesh_of_one_rank_is_none(pool) -> None:
    assert pool.run(_on_a_mesh_of_one, ranks=1) == [1]


@pytest.mark.parametrize("backend", ["native", "sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (2, 1)}], ids=str)
def test_one_visit_is_the_ring_to_the_bit(backend: str, dtype: Any, options: dict) -> None:
    """Whatever strides; and the ring's executor is not asked."""
    if usp.backends()[backend] != "can run here":
        pytest.skip("the compiled extension is not here")

    def results() -> list[Tensor]:
        q, k, v = (x.to(dtype).mT.contiguous().mT.requires_grad_() for x in qkv(7))
        k, v = k[:, :, :1], v[:, :, :1]
        out = usp.long_context_attention(q, k, v, backend=backend, **options)
        return [out, *torch.autograd.grad(out, (q, k, v), qkv(7, 5)[0].to(dtype))]

    kept._KEPT.clear()
    with mock.patch.object(Single, "of", lambda *_: None):
        wanted = results()
    kept._KEPT.clear()
    with mock.patch.object(hybrid, "attention_forward", side_effect=AssertionError):
        found = results()
    assert all(map(torch.equal, found, wanted))


def test_what_may_change_in_place_is_told_apart() -> None:
    """Lists by what they hold; a tensor by what it holds, each time anew."""
    bounds = torch.tensor([0, 3, 5])
    held = bounds.tolist()
    kept._KEPT.clear()
    for middle in (3, 1):
        bounds[1] = held[1] = middle
        for given in (bounds, held):
            out = usp.long_context_attention(*qkv(), cu_seqlens=given)
            expected, _ = dense_attention(*qkv(), cu_seqlens=tuple(bounds.tolist()))
            torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert len(kept._KEPT) == 2


def test_masks_of_classes_that_are_made_anew_are_other_masks() -> None:
    """As in a notebook: equal names, equal values."""

    def made(visible: bool) -> Mask:
        class Mine(Mask):
            def bands(self, positions: Tensor, key_len: int, trim: bool = True) -> Bands:
                ends = torch.zeros(2, 1, len(positions), dtype=torch.int32)
                ends[1] = key_len if visible else 1
                return Bands(*ends)

            def __eq__(self, other: object) -> bool:
                return type(other) is type(self)

            def __hash__(self) -> int:
                return 1

        return Mine()

    for visible in (True, False, True):
        out = usp.long_context_attention(*qkv(), mask=made(visible))
        v = qkv()[2]
        expected = dense_attention(*qkv())[0] if visible else v[:, :1].expand_as(v)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"causal": True}, {"causal": 1}),
        ({"causal": np.True_}, {"causal": 1}),
        ({"causal": True}, {"causal": [True]}),
        ({"window_size": Window(5, None)}, {"window_size": Window(5.0, None)}),
        ({"cu_seqlens": ((0, 1, 5), (0, 5))}, {"cu_seqlens": ((0, True, 5), (0, 5))}),
        ({"window_size": (5, None)}, {"window_size": (5.0, None)}),
        ({"prefix_len": 1, "causal": True}, {"prefix_len": True, "causal": True}),
        ({"cu_seqlens": (0, np.int8(1), 5)}, {"cu_seqlens": (0, np.True_, 5)}),
        ({"query_offset": [1, 1]}, {"query_offset": [1, True]}),
        ({"seq_len": (5, 5)}, {"seq_len": (5.0, 5)}),
        ({"cu_seqlens": (0, 1, 5)}, {"cu_seqlens": (0, True, 5)}),
        ({"validate": True}, {"validate": 1}),
    ],
)
def test_equal_values_of_another_kind_are_refused_still(good: dict, bad: dict) -> None:
    usp.long_context_attention(*qkv(), **good)
    with pytest.raises(TypeError):
        usp.long_context_attention(*qkv(), **bad)


def test_a_backend_that_is_gone_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes is asked at each call."""
    if usp.backends()["native"] != "can run here":
        pytest.skip("the compiled extension is not here")
    expected, _ = dense_attention(*qkv())
    for _ in range(2):
        usp.long_context_attention(*qkv())
        usp.long_context_attention(*qkv(), backend="native")
    monkeypatch.setattr("usp.ops.native._LOAD_ERROR", "not there")
    with mock.patch.object(native, "attention_once", side_effect=AssertionError):
        out = usp.long_context_attention(*qkv())
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(NotImplementedError, match="not there"):
        usp.long_context_attention(*qkv(), backend="native")


def test_an_order_that_was_measured_anew_counts_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    expected = usp.long_context_attention(*qkv())
    row = _local.LocalRow(("reference",), "today", (1.0,))
    try:
        _local.keep(torch.device("cpu"), packages(), row)
        for _ in range(2):
            with mock.patch.object(native, "attention_once", side_effect=AssertionError):
                out = usp.long_context_attention(*qkv())
            torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    finally:
        _local.drop(torch.device("cpu"), packages())


def test_the_same_objects_are_not_read_again() -> None:
    """But for those that may change in place."""
    scale, bounds = 0.3, [0, 3, 5]
    for options, reads in (({"softmax_scale": scale}, 1), ({"cu_seqlens": bounds}, 3)):
        kept._TOLD.clear()
        with mock.patch.object(kept.pickle, "dumps", wraps=kept.pickle.dumps) as dumps:
            for _ in range(3):
                usp.long_context_attention(*qkv(), **options)
        assert dumps.call_count == reads


def test_few_are_kept() -> None:
    kept._KEPT.clear()
    for length in range(kept._MOST + 9):
        usp.long_context_attention(*qkv(length % 40 + 1), softmax_scale=1.0 + length)
    assert len(kept._KEPT) == kept._MOST and len(kept._TOLD) == kept._MOST_TOLD
