"""Train a byte-level decoder on the source code of Python's own library.

Documents (top-level definitions) are packed into one long sequence; attention stays inside each.
One process and many give the same losses, whatever the mesh and the layout:

    python examples/train_lm.py
    torchrun --nproc-per-node 4 examples/train_lm.py --ulysses 2 --ring 2 --compare
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import usp

IGNORED = -100


def documents() -> Iterator[bytes]:
    """Top-level definitions of Python's library, again and again."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for file in itertools.cycle(files):
        for definition in file.read_bytes().split(b"\n\n\n"):
            if len(definition) > 1:
                yield definition


def packed(seq_len: int) -> Iterator[tuple[Tensor, Tensor, tuple[int, ...]]]:
    """Sequences of exactly seq_len bytes: tokens, next tokens, document boundaries."""
    source = documents()
    while True:
        tokens, targets, cu_seqlens = [], [], [0]
        while len(tokens) < seq_len:
            document = next(source)[: seq_len - len(tokens)]
            tokens += document
            targets += [*document[1:], IGNORED]
            cu_seqlens.append(len(tokens))
        yield torch.tensor(tokens), torch.tensor(targets), tuple(cu_seqlens)


def rope(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate pairs of features by the token's position: (B, L, heads, D), (L,)."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = positions[:, None, None] * frequencies
    a, b = x.split(half, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    """Grouped-query attention and an MLP."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.heads = (num_heads, num_kv_heads, num_kv_heads)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, sum(self.heads) * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split(self.heads, dim=2)
        x = x + self.out(attend(rope(q, positions), rope(k, positions), v).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Bytes in, logits of the next byte out; sees just this rank's tokens."""

    def __init__(self, dim: int, depth: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, num_kv_heads) for _ in range(depth))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, 256, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, positions, attend)
        return self.head(self.norm(x))


def train(
    args: argparse.Namespace, mesh: usp.SequenceMesh | None, device: torch.device
) -> list[float]:
    """The loss of every step: a mean over all tokens of all ranks."""
    torch.manual_seed(args.seed)
    model = Decoder(args.dim, args.depth, args.heads, args.kv_heads).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    losses = []
    for step, (tokens, targets, cu_seqlens) in enumerate(packed(args.seq_len)):
        if step == args.steps:
            return losses
        layout = args.layout
        if layout == "document-zigzag":
            layout = usp.DocumentZigzag(cu_seqlens)

        # This rank's tokens, and their places in their documents.
        positions = usp.positions(args.seq_len, mesh, layout, device=device)
        bounds = torch.tensor(cu_seqlens, device=device)
        starts = bounds[torch.searchsorted(bounds, positions, right=True) - 1]
        tokens, targets = (
            usp.shard_sequence(t.to(device)[None], mesh, dim=1, layout=layout)
            for t in (tokens, targets)
        )
        attend = partial(
            usp.long_context_attention,
            mesh=mesh,
            causal=True,
            cu_seqlens=cu_seqlens,
            layout=layout,
            seq_len=args.seq_len,
        )
        logits = model(tokens, positions - starts, attend)

        # The mean over the tokens of all ranks, with the gradient of this rank's.
        loss = usp.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), mesh, ignore_index=IGNORED
        )
        loss.backward()
        usp.all_reduce_gradients(model, mesh)
        optimizer.step()
        optimizer.zero_grad()

        losses.append(float(loss.detach()))
        if (mesh is None or mesh.rank == 0) and (step + 1) % args.log_every == 0:
            print(f"step {step + 1:4}  loss {losses[-1]:.6f}", flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ulysses", type=int, default=1)
    parser.add_argument("--ring", type=int, default=1)
    parser.add_argument(
        "--layout",
        default="document-zigzag",
        choices=["document-zigzag", "zigzag", "striped", "contiguous"],
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
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
