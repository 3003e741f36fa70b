"""On one device, whole graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import usp


def region(x: Tensor) -> Tensor:
    spread = usp.Spread(None, seq_len=x.shape[1])
    variance, mean = spread.var_mean(x, (0, 1))
    return spread.roll((x - mean) * variance, 1) + spread.take(x, [0, -1]).sum(1, keepdim=True)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "take": lambda x: usp.take(x, None, [0, -1]),
    "roll": lambda x: usp.roll(x, None, 2),
    "var": lambda x: usp.var(x, None, (0, 1)),
    "region": region,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_graph_breaks(name: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    x, twin = (torch.arange(42.0).view(2, 7, 3).sin().requires_grad_() for _ in range(2))
    found, wanted = compiled(x), FUNCTIONS[name](twin)
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
