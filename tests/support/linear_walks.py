"""A walk of linear attention's kernels over a rank's tokens equals the recurrence in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from usp.linear_attention.kernels import Tokens
from usp.linear_attention.trust import expected, results
from usp.planning.problem import state_dtype


@dataclass(frozen=True)
class Walk:
    """Tokens of a rank, a state before them, and the gradient of the one behind.

    Attributes:
        heads: Of q, k and v.
        g: Size of its dims: "b" or "1" batch, "l" or "0" tokens (all alike), "h" or "1" heads; and
            with "d" channels.
        strength: Factor of the logs, which lie between -1 and 0; infinite: some forget all.
        fused: Whether q, k and v lie beside each other.
    """

    batch: int = 2
    length: int = 131
    heads: tuple[int, int, int] = (2, 2, 2)
    dims: tuple[int, int] = (5, 7)
    g: str | None = "blh"
    strength: float = 1.0
    fused: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def inputs(self, device: str = "cpu") -> tuple[Tokens, Tensor, Tensor, Tensor]:
        """Tokens, the state before them, and cotangents of out and of the state behind them."""
        random = torch.Generator().manual_seed(self.seed)
        b, n, h, (d, e) = self.batch, self.length, max(self.heads), self.dims
        widths = [each * dim for each, dim in zip(self.heads, (d, d, e), strict=True)]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        parts = normal(b, n, sum(widths)).to(device, self.dtype).split(widths, -1)
        split = [x.unflatten(2, (each, -1)) for x, each in zip(parts, self.heads, strict=True)]
        q, k, v = split if self.fused else (x.contiguous() for x in split)
        wide, g = state_dtype(self.dtype), None
        if self.g is not None:
            shape = b if self.g[0] == "b" else 1, n, h if self.g[2] == "h" else 1
            of = (shape[0], n if self.g[1] == "l" else 1, shape[2])
            of, shape = ((*x, d) if self.g[3:] else x for x in (of, shape))
            logs = -torch.rand(of, generator=random, dtype=torch.float64)
            infinite = self.strength == float("inf")
            logs = logs.where(logs > -0.8, -torch.inf) if infinite else logs * self.strength
            g = logs.to(device, wide).expand(shape)
        before, behind = (normal(b, h, d, e).to(device, wide) for _ in range(2))
        return Tokens(q, k, v, g), before, normal(b, n, h, e).to(device, self.dtype), behind


def walked(family: Any, walk: Walk, device: str = "cpu") -> dict[str, Tensor]:
    """Every result of a family's functions; passes asked for as on one rank give the same bits."""
    tokens, before, dout, behind = walk.inputs(device)
    found = results(family, tokens, before, dout, behind)
    alone, _, saved = family.forward(tokens, before, (), True)
    again = family.backward(tokens, saved, dout, behind, (), False)
    given = dict(zip(("out", "dq", "dk", "dv"), (alone, *again), strict=False))
    assert all(torch.equal(x, found[name]) for name, x in given.items())
    return found


def assert_walk(
    walk: Walk, found: dict[str, Tensor], tolerance: dict[torch.dtype, float], rounds: bool = False
) -> None:
    """Results are those of the recurrence.

    Args:
        tolerance: Of results in a dtype, relative to the largest of a kind.
        rounds: Whether states and decays' gradients, too, are made of factors in the dtype of q.
    """
    wanted = expected(*walk.inputs())
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        y, wide = wanted[name], state_dtype(walk.dtype)
        dtype = walk.dtype if name in ("out", "dq", "dk", "dv") else wide
        assert x.shape == y.shape and x.dtype == dtype, name
        if x.numel():
            scale = max(1.0, y.abs().max().item())
            error = (x.double().cpu() - y).abs().max().item() / scale
            allowed = tolerance[walk.dtype if rounds else dtype]
            assert error <= allowed, f"{name}: {error:.1e} of {scale:.2g}: {walk}"
