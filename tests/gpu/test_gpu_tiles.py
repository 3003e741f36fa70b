"""An MLP and a loss in tiles on a GPU: its generator, its autocast, autograd's own thread."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import usp
from usp.rng import Drawn
from usp.testing import StorageBytes

pytestmark = pytest.mark.gpu


def peak(run: Callable[[], object], device: str) -> int:
    """Bytes beside what was there."""
    if device == "cpu":
        with StorageBytes() as memory:
            run()
        return memory.peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def taken(leaves: list[Tensor]) -> list[Tensor]:
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


def test_an_mlp_with_dropout_under_autocast(device: str) -> None:
    torch.manual_seed(0)
    layers = nn.Linear(64, 512), nn.GELU(), nn.Dropout(0.3), nn.Linear(512, 64)
    module = nn.Sequential(*layers).to(device)
    x = torch.randn(2, 1031, 64, device=device, requires_grad=True)
    leaves, results, peaks = [x, *module.parameters()], [], []

    def by_hand() -> Tensor:
        return torch.cat([module(part) for part in x.tensor_split(8, 1)], 1)

    def step(run: Callable[[], Tensor]) -> None:
        with torch.autocast(device, torch.bfloat16):
            out = run()
        out.float().square().mean().backward()
        results.append([out.detach(), *taken(leaves)])

    for run in (by_hand, lambda: usp.tiled_mlp(module, x, 8)):
        torch.manual_seed(1)
        if run is by_hand:
            with Drawn().again():
                peaks.append(peak(lambda: step(by_hand), device))
        else:
            peaks.append(peak(lambda run=run: step(run), device))
    wanted, found = results
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-2, atol=1e-2)  # the same are dropped
    for one, two in zip(found, wanted, strict=True):
        assert (one - two).norm() <= 1e-2 * two.norm()
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_loss_scaled_for_its_dtype(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 64, device=device, dtype=dtype) / 4 for n in (1031, 4099))
    labels = torch.randint(4099, (1031,), device=device)
    labels[::5] = -100
    given = [hidden.requires_grad_(), weight.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in given]
    wanted = F.cross_entropy(F.linear(*exact), labels)
    wanted.backward(torch.full_like(wanted, 1024))

    def step() -> None:
        loss = usp.tiled_cross_entropy(*given, labels)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-3, atol=0)
        (1024 * loss).backward()

    assert peak(step, device) < 1031 * 4099 * 4 / 2  # half of all logits
    for found, leaf in zip(taken(given), exact, strict=True):
        assert (found - leaf.grad).norm() <= 1e-2 * leaf.grad.norm()
