"""Torch's own models of `nn.MultiheadAttention`, small, in fp64."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

F64 = torch.float64
WIDTH = 12


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def make_encoder(batch_first: bool = True, norm_first: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, 4, 16, 0.0, batch_first=batch_first, norm_first=norm_first, dtype=F64
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor is True")
        return nn.TransformerEncoder(layer, 2, **options)
