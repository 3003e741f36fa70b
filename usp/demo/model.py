"""A small vision transformer on `torch.nn.MultiheadAttention`, trained to fill in hidden patches.

Nothing here knows of processes: `usp.replace_attention` makes the sharded model out of this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from usp.demo.image import PatchGrid


def grid_embedding(coordinates: Tensor, embed_dim: int) -> Tensor:
    """Sines and cosines of rows and columns: (..., L, 2) -> (..., L, embed_dim).

    Raises:
        ValueError: embed_dim is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim must be a multiple of 4, got {embed_dim}")
    bands = embed_dim // 4
    # Wavelengths from 4 to 256 patches.
    wavelengths = 4 * 64 ** (torch.arange(bands, device=coordinates.device) / max(bands - 1, 1))
    angles = 2 * math.pi * coordinates[..., None] / wavelengths
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(-2)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
        self.mlp_norm = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim), nn.GELU(), nn.Linear(4 * embed_dim, embed_dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.mlp_norm(x))


class PatchTransformer(nn.Module):
    """Reads patches, some of them hidden, and says what every patch looks like."""

    def __init__(self, patch_dim: int, embed_dim: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(patch_dim, embed_dim)
        self.hidden_patch = nn.Parameter(torch.zeros(embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, patch_dim)

    @property
    def last_attention(self) -> nn.MultiheadAttention:
        attention = self.blocks[-1].attention
        assert isinstance(attention, nn.MultiheadAttention)
        return attention

    def forward(self, patches: Tensor, coordinates: Tensor, hidden: Tensor) -> Tensor:
        """(B, L, patch_dim), (B | 1, L, 2), (B, L) bool, True = hidden -> (B, L, patch_dim)."""
        x = torch.where(hidden[:, :, None], self.hidden_patch, self.embed(patches))
        x = x + grid_embedding(coordinates, x.shape[-1]).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def hidden_patches(grid: PatchGrid, fraction: float, seed: int) -> Tensor:
    """(1, tokens) bool: a random choice of patches to hide, the same in every process."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.rand(1, grid.tokens, generator=generator, device="cpu") < fraction


def reconstruction_loss(output: Tensor, patches: Tensor, hidden: Tensor, count: int) -> Tensor:
    """Squared error of the hidden patches, divided by `count`, the hidden values of ALL ranks.

    So the loss of the whole picture is the sum of the ranks' losses.
    """
    error = (output - patches).square().sum(dim=-1)
    return torch.where(hidden, error, 0).sum() / count


def train(
    model: PatchTransformer,
    patches: Tensor,
    grid: PatchGrid,
    *,
    steps: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Train on random small windows of the picture, so that attention has something to show."""
    if not steps:
        return
    batch, side = 4, min(14, grid.rows, grid.columns)
    limits = torch.tensor([grid.rows - side + 1, grid.columns - side + 1])
    window = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        corner = (torch.rand(batch, 1, 2) * limits).long()
        coordinates = corner + window
        x = patches[coordinates[..., 0] * grid.columns + coordinates[..., 1]]
        hidden = torch.rand(x.shape[:2]) < 0.5
        output = model(x, coordinates, hidden)
        loss = reconstruction_loss(output, x, hidden, int(hidden.sum()) * grid.patch_dim)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step(step + 1, float(loss.detach()))
