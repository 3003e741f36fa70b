"""Train a byte-level decoder on the source code of Python's own library.

Documents (top-level definitions) are packed into one long sequence; attention stays inside each.
One process and many give the same losses, whatever the mesh and the layout:

    python examples/train_lm.py
    torchrun --nproc-per-node 4 examples/train_lm.py --ulysses 2 --ring 2 --compare
"""

from __future__ import annotations

import argparse
import itertools
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import _common
import torch
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
    run = _common.Run(args, mesh, model, optimizer)
    for tokens, targets, cu_seqlens in run.over(packed(args.seq_len)):
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
        run.step(loss)
        run.losses.append(float(loss.detach()))
    return run.losses


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    layouts = ["document-zigzag", "zigzag", "striped", "contiguous"]
    options = _common.parser(__doc__.splitlines()[0], layouts)
    options.add_argument("--seq-len", type=int, default=2048)
    options.add_argument("--dim", type=int, default=128)
    options.add_argument("--depth", type=int, default=2)
    options.add_argument("--heads", type=int, default=4)
    options.add_argument("--kv-heads", type=int, default=2)
    return options.parse_args(argv)


if __name__ == "__main__":
    sys.exit(_common.main(parse(), train))
