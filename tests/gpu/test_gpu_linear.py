"""Linear attention's kernels on a GPU: walks equal the recurrence, and whole calls use them."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from gpu_checks import poisoned
from linear_walks import Walk, assert_walk, walked

import usp
from usp.linear_attention import families, triton
from usp.linear_attention.kernels import Traits
from usp.testing import linear_recurrence

pytestmark = pytest.mark.gpu
# of states and decays' gradients, too, which are made of rounded factors; see test_triton_linear.py
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
WALKS = {
    "no tokens": Walk(length=0),
    "a decay a token": Walk(length=197, heads=(2, 2, 2)),
    "shared heads": Walk(length=197, heads=(1, 2, 4), fused=True),
    "one decay": Walk(length=197, g="101", strength=0.05),
    "forgetting": Walk(length=197, g="1l1", strength=float("inf")),
    "a decay a channel": Walk(length=197, heads=(2, 1, 2), g="blhd", strength=20.0),
    "no decay": Walk(length=197, g=None),
    "few tokens": Walk(length=3, heads=(3, 1, 3)),
}
DIMS = [(64, 64), (128, 128), (40, 72), (256, 64), (5, 7)]


def on(walk: Walk, device: str) -> Walk:
    """A smaller one for a rehearsal."""
    if device == "cuda":
        return walk
    return replace(walk, batch=1, length=min(walk.length, 19), dims=(5, 7))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("kind", WALKS)
def test_walks(kind: str, dims: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    walk = on(replace(WALKS[kind], dims=dims, dtype=dtype), device)
    with poisoned():
        found, again = (walked(triton, walk, device) for _ in range(2))
    for name, x in found.items():
        assert torch.equal(x, again[name]), f"{name} differs from run to run"
    assert_walk(walk, found, TOLERANCE, rounds=True)


def test_the_whole_call_uses_them_and_finds_them_right(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USP_SELF_CHECK", "1")
    traits = Traits(torch.device(device), torch.bfloat16, (16, 16), "tokens")
    if device == "cpu":  # where others take it, too
        monkeypatch.setattr(families, "FAMILIES", (triton,))
    assert families.chosen(traits) is triton
    torch.manual_seed(0)
    shape = (1, 301, 2, 16) if device == "cuda" else (1, 19, 2, 16)
    q, k, v = torch.randn(3, *shape).bfloat16()
    decay = -torch.rand(shape[:3])
    given = [x.to(device).requires_grad_() for x in (q, k, v, decay)]
    with mock.patch.object(triton, "forward", wraps=triton.forward) as forward:
        out = usp.linear_attention(*given, cu_seqlens=(0, 7, shape[1]))
    assert forward.call_count == 1
    gradients = torch.autograd.grad(out.float().square().sum(), given)
    leaves = [x.double().requires_grad_() for x in (q, k, v, decay)]
    wanted, _ = linear_recurrence(*leaves, cu_seqlens=(0, 7, shape[1]))
    found = [out, *gradients]
    right = [wanted, *torch.autograd.grad(wanted.square().sum(), leaves)]
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x.double().cpu(), y, rtol=0, atol=2e-2 * y.abs().max().item())
