"""Modules of torch that look at several tokens, and would see this rank's alone."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

_POOLS = (
    "MaxPool",
    "AvgPool",
    "LPPool",
    "FractionalMaxPool",
    "AdaptiveMaxPool",
    "AdaptiveAvgPool",
)


def reason(module: nn.Module) -> str | None:
    """Why a module is no matter of each token by itself; None where it may be."""
    kind = type(module).__name__
    if isinstance(module, _InstanceNorm | nn.GroupNorm) or (
        isinstance(module, _NormBase) and not isinstance(module, _InstanceNorm)
    ):
        return "its statistics are over the tokens that it sees (usp.var_mean has those of all)"
    if isinstance(module, _ConvNd) and any(size != 1 for size in module.kernel_size):
        return f"its kernel of {tuple(module.kernel_size)} reaches over the edge of a shard"
    if isinstance(module, nn.RNNBase):
        return "it goes from token to token"
    if type(module).__module__ == "torch.nn.modules.pooling" and kind.startswith(_POOLS):
        return "it joins tokens"
    return None


# ends of names of classes that drop whole samples, so that all ranks must drop the same
OF_SAMPLES = ("DropPath", "StochasticDepth")


def drops_samples(module: nn.Module) -> bool:
    """Whether it is one of those, under whichever library's name."""
    return type(module).__name__.endswith(OF_SAMPLES)
