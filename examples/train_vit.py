"""Train a vision transformer to fill in hidden patches of a photograph.

Every step takes a window of the Hubble eXtreme Deep Field (it lies in scikit-image's wheel), cuts
it into patches, hides half of them and asks the model for their pixels. Attention dropout and
DropPath are on, and one process and many still give the same losses:

    python examples/train_vit.py
    torchrun --nproc-per-node 4 examples/train_vit.py --ulysses 2 --ring 2 --compare
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

import usp

LAYOUTS = ["contiguous", "zigzag", "striped"]


def photograph() -> Tensor:
    """(872, 1000, 3) pixels with mean 0 and variance 1."""
    from skimage import data

    pixels = torch.tensor(data.hubble_deep_field()).float()
    return (pixels - pixels.mean()) / pixels.std()


def windows(pixels: Tensor, rows: int, columns: int, patch: int, seed: int) -> Iterator[Tensor]:
    """Random windows of the picture as sequences of patches, (rows * columns, 3 * patch**2)."""
    generator = torch.Generator().manual_seed(seed)
    height, width = rows * patch, columns * patch
    while True:
        top = int(torch.randint(pixels.shape[0] - height + 1, (), generator=generator))
        left = int(torch.randint(pixels.shape[1] - width + 1, (), generator=generator))
        window = pixels[top : top + height, left : left + width]
        tiles = window.reshape(rows, patch, columns, patch, 3).transpose(1, 2)
        yield tiles.reshape(rows * columns, -1)


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
    pictures = windows(photograph(), args.rows, args.columns, args.patch, args.seed)
    losses = []
    for step in range(args.steps):
        # The same picture and the same hidden patches on every rank; each keeps its own tokens.
        batch = torch.stack([next(pictures) for _ in range(args.batch)]).to(device)
        hidden = (torch.rand(batch.shape[:2]) < 0.5).to(device)
        count = int(hidden.sum()) * batch.shape[-1]
        batch = usp.shard_sequence(batch, mesh, dim=1, layout=args.layout)
        hidden = usp.shard_sequence(hidden, mesh, dim=1, layout=args.layout)

        # The whole loss is the sum of the ranks' losses: divide by the values of all ranks.
        error = (model(batch, hidden, positions) - batch).square().sum(dim=-1)
        loss = (error * hidden).sum() / count
        loss.backward()
        usp.all_reduce_gradients(model, mesh)
        optimizer.step()
        optimizer.zero_grad()

        total = loss.detach().clone()
        if mesh is not None:
            dist.all_reduce(total)
        losses.append(float(total))
        if (mesh is None or mesh.rank == 0) and (step + 1) % args.log_every == 0:
            print(f"step {step + 1:4}  loss {losses[-1]:.6f}", flush=True)
    return losses


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ulysses", type=int, default=1)
    parser.add_argument("--ring", type=int, default=1)
    parser.add_argument("--layout", default="contiguous", choices=LAYOUTS)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rows", type=int, default=17, help="patches; need not divide by anything")
    parser.add_argument("--columns", type=int, default=19)
    parser.add_argument("--patch", type=int, default=8, help="pixels")
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.1, help="of attention weights")
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu or cuda; by default a GPU for each process, if any")
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--compare", action="store_true", help="then train again on one process")
    return parser.parse_args(argv)


def start(args: argparse.Namespace) -> tuple[usp.SequenceMesh | None, torch.device]:
    """The mesh of all processes, None for one by itself, and the device of this one."""
    if args.ulysses * args.ring > 1 or "RANK" in os.environ or "SLURM_PROCID" in os.environ:
        # Makes this process's own device the current one, or says why there is none.
        mesh = usp.init_mesh(args.ulysses, args.ring, device_type=args.device)
        return mesh, torch.device(mesh.device_type)
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return None, torch.device(args.device or accelerator)


def main() -> int:
    args = parse()
    mesh, device = start(args)
    world = 1 if mesh is None else mesh.size
    began = time.perf_counter()
    losses = train(args, mesh, device)
    status = 0
    if mesh is None or mesh.rank == 0:
        print(f"{args.steps} steps on {world} process(es): {time.perf_counter() - began:.1f} s")
        if args.compare:
            alone = train(args, None, device)
            difference = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
            print(f"largest difference of the loss from one process: {difference:.1e}")
            status = int(not difference <= 1e-5)
    if mesh is not None:
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
