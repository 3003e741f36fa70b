"""What the demo's processes have to agree on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from usp.demo.image import PatchGrid
from usp.demo.model import PatchTransformer, hidden_patches

# Largest difference that counts as the same result, relative to the largest value of a tensor.
TOLERANCES = {"float64": 1e-9, "float32": 5e-5, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Settings:
    """One run of the demo; `folder` is where its processes leave their results.

    `times`: the sequence is the picture so many times over. Softmax sees each key as often, so that
    every copy has the output of the single picture, and a parameter its gradient.
    `limit`: bytes that a process may take for its step; None is any.
    """

    grid: PatchGrid
    folder: str
    ulysses_degree: int = 2
    ring_degree: int = 2
    layout: str = "contiguous"
    dtype_name: str = "float32"
    embed_dim: int = 96
    num_heads: int = 4
    depth: int = 2
    train_steps: int = 120
    hidden_fraction: float = 0.2
    times: int = 1
    limit: int | None = None

    @property
    def processes(self) -> int:
        return self.ulysses_degree * self.ring_degree

    @property
    def tokens(self) -> int:
        """Of the whole sequence."""
        return self.times * self.grid.tokens

    @property
    def attention_dtype(self) -> torch.dtype:
        """Of the queries, keys and values."""
        dtype = getattr(torch, self.dtype_name)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Of the weights: bf16 means autocast over fp32 weights, as one trains.

        In bf16 throughout, sums over the tokens in plain layers (the gradient of a LayerNorm's
        weight) are off by tens of percent in either run and would hide what is to be seen.
        """
        return torch.promote_types(self.attention_dtype, torch.float32)

    def autocast(self, device_type: str) -> torch.autocast:
        """The context in which the model runs forward."""
        mixed = self.attention_dtype != self.parameter_dtype
        return torch.autocast(device_type, self.attention_dtype, enabled=mixed)

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype_name]

    def file(self, name: str) -> Path:
        return Path(self.folder) / name

    def model(self) -> PatchTransformer:
        return PatchTransformer(self.grid.patch_dim, self.embed_dim, self.num_heads, self.depth)

    def hidden(self) -> torch.Tensor:
        """(1, tokens) bool, True = hidden, the same in every process."""
        return hidden_patches(self.grid, self.hidden_fraction, seed=1).repeat(1, self.times)
