"""Train a transformer to forecast the atmosphere: latitude x longitude x levels x time.

Potential temperature and pressure on ten levels, every ten minutes of a night in September 2009
(Met Office, COLPEX; in the wheel of iris-sample-data, under the Open Government Licence).
Tokens are patches of one level at one time. Each sees its own time and those before, and tells how
its patch will have changed ten minutes later; a loss of 1 is that of saying that nothing will.

    python examples/train_climate.py
    torchrun --nproc-per-node 4 examples/train_climate.py --ulysses 2 --ring 2 --compare
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import _common
import torch
from torch import Tensor, nn

import usp


def records(raw: bytes) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Of a PP file, the Met Office's: (date, quantity, level) of each, and its (rows, columns).

    All numbers are big-endian words, each part between two counts of its bytes: first a head of 45
    integers and 19 floats (Unified Model Documentation Paper F03), then the values.
    """
    at = 0
    while at < len(raw):
        head = [int.from_bytes(raw[i : i + 4], "big") for i in range(at + 4, at + 184, 4)]
        at += 264 + 4
        size = head[17] * head[18]
        words = torch.frombuffer(bytearray(raw[at : at + 4 * size]), dtype=torch.uint8)
        values = words.view(-1, 4).flip(1).contiguous().view(torch.float32)
        yield (*head[:5], head[41], head[32]), values.view(head[17], head[18])
        at += int.from_bytes(raw[at - 4 : at], "big") + 4


def fields() -> Tensor:
    """(6 times, 10 levels, 83 rows, 83 columns, 2 quantities)."""
    package = find_spec("iris_sample_data")
    if package is None:
        raise SystemExit("the fields lie in a wheel: pip install iris-sample-data")
    file = Path(package.submodule_search_locations[0]) / "sample_data" / "colpex.pp"
    found = sorted(records(file.read_bytes()), key=lambda record: record[0])
    values = torch.stack([values for _, values in found])
    return values.view(6, 2, 10, *values.shape[1:]).movedim(1, -1)


def windows(whole: Tensor, args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Random columns of air: tokens, and how they change, (times * levels * patches, values)."""
    generator = torch.Generator().manual_seed(args.seed)
    change = whole.diff(dim=0)
    change = change / change.square().mean((0, 1, 2, 3)).sqrt()  # 1 is what happens in ten minutes
    air = whole - whole.mean((0, 2, 3), keepdim=True)  # of its level
    air = (air / air.square().mean((0, 1, 2, 3)).sqrt())[:-1]
    sizes = args.rows * args.patch, args.columns * args.patch
    while True:
        top, left = (
            int(torch.randint(most - size + 1, (), generator=generator))
            for most, size in zip(whole.shape[2:4], sizes, strict=True)
        )
        yield tuple(
            x[:, :, top : top + sizes[0], left : left + sizes[1]]
            .unflatten(3, (args.columns, args.patch))
            .unflatten(2, (args.rows, args.patch))
            .transpose(3, 4)  # times, levels, rows, columns, patch, patch, quantities
            .flatten(4)
            .flatten(0, 3)
            for x in (air, change)
        )


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, spread: usp.Spread, mask: usp.masks.Mask) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        x = x + self.out(spread.attention(*qkv.unbind(2), mask=mask).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Forecast(nn.Module):
    """Patches in, their changes out; sees just this rank's tokens."""

    def __init__(self, args: argparse.Namespace, grid: tuple[int, ...]) -> None:
        super().__init__()
        values = 2 * args.patch**2
        self.embed = nn.Linear(values, args.dim)
        self.places = nn.ParameterList(nn.Parameter(0.02 * torch.randn(n, args.dim)) for n in grid)
        self.blocks = nn.ModuleList(Block(args.dim, args.heads) for _ in range(args.depth))
        self.norm, self.head = nn.LayerNorm(args.dim), nn.Linear(args.dim, values)
        nn.init.zeros_(self.head.weight)  # begins by saying that nothing changes
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, spread: usp.Spread, mask: usp.masks.Mask) -> Tensor:
        x = self.embed(x)
        grid = [len(table) for table in self.places]
        # time, level, row and column of this rank's tokens
        places = torch.unravel_index(spread.positions(x.device), grid)
        for table, place in zip(self.places, places, strict=True):
            x = x + table[place]
        for block in self.blocks:
            x = block(x, spread, mask)
        return self.head(self.norm(x))


def train(
    args: argparse.Namespace, mesh: usp.SequenceMesh | None, device: torch.device
) -> list[float]:
    """The loss of every step: a mean over all values of all ranks."""
    torch.manual_seed(args.seed)
    whole = fields()[: args.times + 1, : args.levels]
    grid = (len(whole) - 1, whole.shape[1], args.rows, args.columns)
    times, tokens = grid[0], args.levels * args.rows * args.columns
    mask = usp.masks.blocks([n * tokens for n in range(times + 1)])
    spread = usp.Spread(mesh, args.layout, times * tokens)
    model = Forecast(args, grid).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    run = _common.Run(args, mesh, model, optimizer)
    for batch in run.over(windows(whole, args)):
        air, change = (spread.shard(x[None].to(device)) for x in batch)
        # The whole loss is the sum of the ranks' losses: divide by the values of all ranks.
        error = (model(air, spread, mask) - change).square().sum() / batch[1].numel()
        run.step(error)
        run.losses.append(float(_common.added(error, mesh)))
    return run.losses


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    layouts = ["zigzag", "striped", "contiguous"]
    options = _common.parser(__doc__.splitlines()[0], layouts)
    options.add_argument("--times", type=int, default=5, help="that are seen, at most 5")
    options.add_argument("--levels", type=int, default=10, help="at most 10")
    options.add_argument("--rows", type=int, default=4, help="patches")
    options.add_argument("--columns", type=int, default=6, help="patches")
    options.add_argument("--patch", type=int, default=4, help="grid points, of 83")
    options.add_argument("--dim", type=int, default=96)
    options.add_argument("--depth", type=int, default=2)
    options.add_argument("--heads", type=int, default=3)
    return options.parse_args(argv)


if __name__ == "__main__":
    sys.exit(_common.main(parse(), train))
