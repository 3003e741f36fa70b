"""What ``usp verify`` is handed on the command line, and what comes to no end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import verify_models as models
from torch import Tensor, nn

import usp


def right() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return models.Encoder(), models.wide()


def wrong() -> dict[str, Any]:
    torch.manual_seed(0)
    model = models.Encoder(models.OfTorch(nn.InstanceNorm1d(models.WIDTH)))
    return {"model": model, "inputs": models.wide(), "sharded": models.replaced}


def refused() -> tuple[nn.Module, Any]:
    """A norm over tokens in the trunk."""
    model = models.Encoder()
    model.encoder.layers[1].norm2 = nn.InstanceNorm1d(models.TOKENS)
    return model, models.wide()


def unknown() -> tuple[nn.Module, Any]:
    """Of whose trunk nothing is said."""
    return Short(), models.wide()


def nothing() -> int:
    return 3


def raises(model: nn.Module, mesh: usp.SequenceMesh) -> Callable[..., Any]:
    """One rank raises where the others wait for it."""
    usp.replace_attention(model, mesh)

    def call(x: Tensor) -> Any:
        if mesh.rank:
            model.encoder.layers[1].linear1.register_forward_pre_hook(_raise)
        return model(usp.shard_sequence(x, mesh, 1))

    return call


def _raise(module: nn.Module, args: Any) -> None:
    raise ArithmeticError("of this rank alone")


def skips(model: nn.Module, mesh: usp.SequenceMesh) -> Callable[..., Any]:
    """One rank never comes."""
    usp.replace_attention(model, mesh)

    def call(x: Tensor) -> Any:
        if mesh.rank:
            model.encoder.layers[1].linear1.register_forward_pre_hook(_wait)
        return model(usp.shard_sequence(x, mesh, 1))

    return call


def _wait(module: nn.Module, args: Any) -> None:
    time.sleep(60)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, dtype=x.dtype)


class Short(nn.Module):
    """Knows no fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(models.WIDTH, models.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("not implemented for 'Double'")
        return self.inner(x)
