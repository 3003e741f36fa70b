"""Train a vision transformer to fill in hidden patches of a photograph.

Every step takes a window of the Hubble eXtreme Deep Field (it lies in scikit-image's wheel), cuts
it into patches, hides half of them and asks the model for their pixels. Attention dropout and
DropPath are on, and one process and many still give the same losses:

    python examples/train_vit.py
    torchrun --nproc-per-node 4 examples/train_vit.py --ulysses 2 --ring 2 --compare
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import _common
import torch
from torch import Tensor, nn

import usp


def photograph() -> Tensor:
    """(872, 1000, 3) pixels with mean 0 and variance 1."""
    from skimage import data

    pixels = torch.tensor(data.hubble_deep_field()).float()
    return (pixels - pixels.mean()) / pixels.std()


def windows(pixels: Tensor, args: argparse.Namespace) -> Iterator[Tensor]:
    """Random windows of the picture as sequences of patches, (batch, patches, 3 * patch**2)."""
    generator = torch.Generator().manual_seed(args.seed)
    height, width = args.rows * args.patch, args.columns * args.patch
    while True:
        batch = []
        for _ in range(args.batch):
            top = int(torch.randint(pixels.shape[0] - height + 1, (), generator=generator))
            left = int(torch.randint(pixels.shape[1] - width + 1, (), generator=generator))
            window = pixels[top : top + height, left : left + width]
            tiles = window.reshape(args.rows, args.patch, args.columns, args.patch, 3)
            batch.append(tiles.transpose(1, 2).flatten(2).flatten(0, 1))
        yield torch.stack(batch)


class DropPath(nn.Module):
    """Leave out a branch now and then: the same choice on every rank that holds the sample."""

    def __init__(self, p: float, mesh: usp.SequenceMesh | None) -> None:
        super().__init__()
        self.p, self.mesh = p, mesh

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or not self.p:
            return branch
        with usp.rng.replicated(self.mesh):
            keep = torch.rand(len(branch), 1, 1) >= self.p
        return branch * (keep / (1 - self.p)).to(branch)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm."""

    def __init__(self, args: argparse.Namespace, mesh: usp.SequenceMesh | None) -> None:
        super().__init__()
        dim = args.dim
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = usp.MultiheadAttention(
            dim,
            args.heads,
            dropout=args.dropout,
            batch_first=True,
            mesh=mesh,
            layout=args.layout,
            seq_len=args.rows * args.columns,
        )
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop_path = DropPath(args.drop_path, mesh)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        x = x + self.drop_path(self.attention(y, y, y, need_weights=False)[0])
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))


class VisionTransformer(nn.Module):
    """Patches in, patches out; sees just this rank's tokens and their positions."""

    def __init__(self, args: argparse.Namespace, mesh: usp.SequenceMesh | None) -> None:
        super().__init__()
        patch_dim = 3 * args.patch**2
        self.embed = nn.Linear(patch_dim, args.dim)
        self.hidden_patch = nn.Parameter(torch.zeros(args.dim))
        self.position = nn.Parameter(0.02 * torch.randn(args.rows * args.columns, args.dim))
        self.blocks = nn.Sequential(*(Block(args, mesh) for _ in range(args.depth)))
        self.norm = nn.LayerNorm(args.dim)
        self.head = nn.Linear(args.dim, patch_dim)

    def forward(self, patches: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        x = torch.where(hidden[..., None], self.hidden_patch, self.embed(patches))
        return self.head(self.norm(self.blocks(x + self.position[positions])))


def train(
    args: argparse.Namespace, mesh: usp.SequenceMesh | None, device: torch.device
) -> list[float]:
    """The loss of every step: a mean over the hidden values of all ranks."""
    torch.manual_seed(args.seed)
    model = VisionTransformer(args, mesh).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    seq_len = args.rows * args.columns
    positions = usp.positions(seq_len, mesh, args.layout, device=device)
    run = _common.Run(args, mesh, model, optimizer)
    for batch in run.over(windows(photograph(), args)):
        # The same picture and the same hidden patches on every rank; each keeps its own tokens.
        batch = batch.to(device)
        hidden = (torch.rand(batch.shape[:2]) < 0.5).to(device)
        count = int(hidden.sum()) * batch.shape[-1]
        batch = usp.shard_sequence(batch, mesh, dim=1, layout=args.layout)
        hidden = usp.shard_sequence(hidden, mesh, dim=1, layout=args.layout)

        # The whole loss is the sum of the ranks' losses: divide by the values of all ranks.
        error = (model(batch, hidden, positions) - batch).square().sum(dim=-1)
        loss = (error * hidden).sum() / count
        run.step(loss)
        run.losses.append(float(_common.added(loss, mesh)))
    return run.losses


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    options = _common.parser(__doc__.splitlines()[0], ["contiguous", "zigzag", "striped"])
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--rows", type=int, default=17, help="patches; any number, up to 109")
    options.add_argument("--columns", type=int, default=19, help="up to 125")
    options.add_argument("--patch", type=int, default=8, help="pixels")
    options.add_argument("--dim", type=int, default=96)
    options.add_argument("--depth", type=int, default=2)
    options.add_argument("--heads", type=int, default=3)
    options.add_argument("--dropout", type=float, default=0.1, help="of attention weights")
    options.add_argument("--drop-path", type=float, default=0.1)
    return options.parse_args(argv)


if __name__ == "__main__":
    sys.exit(_common.main(parse(), train))
