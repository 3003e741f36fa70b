"""Every kind of parallelism at once: data, pipeline, ring, Ulysses and tensor, on one DeviceMesh.

A byte-level decoder on the source code of Python's own library. One process and many give the same
losses:

    python examples/train_hybrid.py
    torchrun --nproc-per-node 8 examples/train_hybrid.py --pipeline 2 --ring 2 --tensor 2 --compare
    torchrun --nproc-per-node 8 examples/train_hybrid.py --data 2 --ulysses 2 --tensor 2 --compare
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import sysconfig
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import _common
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import usp

AXES = ("data", "pipeline", "ring", "ulysses", "tensor")
LAYOUT = "zigzag"


@dataclass(frozen=True)
class Place:
    """This process among all: the parts of the mesh, or one process by itself."""

    device: torch.device
    whole: DeviceMesh | None = None
    sequence: usp.SequenceMesh | None = None

    def axis(self, name: str) -> tuple[int, int]:
        """Rank and size along an axis."""
        if self.whole is None:
            return 0, 1
        return self.whole.get_local_rank(name), self.whole[name].size()


def batches(args: argparse.Namespace) -> Tensor:
    """(steps, batch, seq_len + 1) bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    size = args.batch * (args.seq_len + 1)
    text = b"".join(file.read_bytes() for file in files)[: args.steps * size]
    assert len(text) == args.steps * size, "Python's library is too short for so many steps"
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).view(args.steps, args.batch, -1)


class Block(nn.Module):
    """Attention and an MLP; under tensor parallelism with some of the heads and hidden features."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.wide, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.attend = usp.LongContextAttention(causal=True)

    def spread(self, place: Place, seq_len: int) -> None:
        """Sequence ranks share the attention, tensor ranks the heads."""
        rank, ranks = place.axis("tensor")
        self.attend = usp.LongContextAttention(
            place.sequence,
            causal=True,
            layout=LAYOUT,
            seq_len=seq_len,
            heads=(self.num_heads * rank // ranks, self.num_heads),
        )
        if place.whole is not None:
            wide = dict.fromkeys(("q", "k", "v", "wide"), ColwiseParallel())
            narrow = dict.fromkeys(("out", "narrow"), RowwiseParallel())
            parallelize_module(self, place.whole["tensor"], wide | narrow)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (p(y).unflatten(-1, (-1, self.head_dim)) for p in (self.q, self.k, self.v))
        x = x + self.out(self.attend(q, k, v).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))


class Embedding(nn.Module):
    """Bytes, and the places of this rank's tokens in the whole sequence."""

    def __init__(self, dim: int, seq_len: int) -> None:
        super().__init__()
        self.of_bytes, self.of_places = nn.Embedding(256, dim), nn.Embedding(seq_len, dim)
        self.seq_len, self.mesh = seq_len, None

    def forward(self, tokens: Tensor) -> Tensor:
        places = usp.positions(self.seq_len, self.mesh, LAYOUT, device=tokens.device)
        return self.of_bytes(tokens) + self.of_places(places)


def make_stage(args: argparse.Namespace, place: Place) -> nn.Sequential:
    """This rank's layers of the model: all ranks draw the same whole, and keep their part."""
    torch.manual_seed(args.seed)
    embedding = Embedding(args.dim, args.seq_len)
    blocks = [Block(args.dim, args.heads) for _ in range(args.depth)]
    head = nn.Sequential(nn.RMSNorm(args.dim), nn.Linear(args.dim, 256, bias=False))
    embedding.mesh = place.sequence
    stage, stages = place.axis("pipeline")
    own = blocks[args.depth * stage // stages : args.depth * (stage + 1) // stages]
    for block in own:
        block.spread(place, args.seq_len)
    layers = {"embedding": embedding, **{f"block {n}": block for n, block in enumerate(blocks)}}
    layers["head"] = head  # names of the whole, which a checkpoint goes by on any mesh
    here = {embedding: stage == 0, head: stage == stages - 1} | dict.fromkeys(own, True)
    own_layers = {name: layer for name, layer in layers.items() if here.get(layer)}
    return nn.Sequential(OrderedDict(own_layers)).to(place.device)


def part_of_loss(logits: Tensor, targets: Tensor, count: int) -> Tensor:
    """This rank's part of the mean over ``count`` tokens: sequence ranks add theirs."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / count


class Schedule:
    """Forward and backward of a step: alone, or micro-batch by micro-batch through the pipeline."""

    def __init__(self, args: argparse.Namespace, place: Place, model: nn.Sequential) -> None:
        self.model, (self.stage, self.stages) = model, place.axis("pipeline")
        _, data = place.axis("data")
        self.loss = partial(part_of_loss, count=args.batch // data * args.seq_len)
        if self.stages > 1:
            stage = PipelineStage(
                model,
                self.stage,
                self.stages,
                place.device,
                group=place.whole.get_group("pipeline"),
            )
            # each micro-batch has its part of one mean: nothing is left to be scaled
            self.pipeline = Schedule1F1B(
                stage, args.micro_batches, loss_fn=self.loss, scale_grads=False
            )

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """This rank's part of the loss; 0 on other stages than the last."""
        if self.stages == 1:
            loss = self.loss(self.model(tokens), targets)
            loss.backward()
            return loss.detach()
        losses: list[Tensor] = []
        given = (tokens,) if self.stage == 0 else ()
        if self.stage == self.stages - 1:
            self.pipeline.step(*given, target=targets, losses=losses)
        else:
            self.pipeline.step(*given)
        return sum((loss.detach() for loss in losses), torch.zeros((), device=tokens.device))


def train(args: argparse.Namespace, place: Place) -> list[float]:
    """The loss of every step: a mean over all tokens of all ranks."""
    model = make_stage(args, place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=1e-6)
    schedule = Schedule(args, place, model)
    (own, data), group = place.axis("data"), None
    if place.whole is not None:
        group = place.whole.get_group("data")
    run = _common.Run(args, place.whole, model, optimizer)
    for bytes_of_all in run.over(batches(args)):
        own_bytes = bytes_of_all.chunk(data)[own].long().to(place.device)
        tokens, targets = (
            usp.shard_sequence(x, place.sequence, dim=1, layout=LAYOUT)
            for x in (own_bytes[:, :-1], own_bytes[:, 1:])
        )
        loss = schedule.step(tokens, targets)

        # Sequence ranks add, data ranks average; tensor and pipeline ranks have other parameters.
        usp.all_reduce_gradients(model, place.sequence, group)
        optimizer.step()
        optimizer.zero_grad()

        if place.whole is not None:  # tensor ranks have the same loss
            for axis in ("pipeline", "ring", "ulysses", "data"):
                dist.all_reduce(loss, group=place.whole.get_group(axis))
        run.losses.append(float(loss) / data)
    return run.losses


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = _common.parser(__doc__.splitlines()[0], [LAYOUT], steps=20)
    for axis in ("data", "pipeline", "tensor"):
        parser.add_argument(f"--{axis}", type=int, default=1, help="ranks along this axis")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a pipeline, and a step")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=257)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    return parser.parse_args(argv)


def start(args: argparse.Namespace) -> Place:
    """This process's place; without torchrun or srun it is the only one."""
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = tuple(getattr(args, axis) for axis in AXES)
    if "RANK" in os.environ or "SLURM_PROCID" in os.environ:
        # Starts the processes under Slurm, too, and makes each one's own device the current one.
        usp.init_mesh(1, math.prod(sizes), device_type=kind)
    if not dist.is_initialized():
        return Place(torch.device(kind))
    whole = init_device_mesh(kind, sizes, mesh_dim_names=AXES)
    return Place(torch.device(kind), whole, usp.SequenceMesh.from_device_mesh(whole))


def main() -> int:
    args = parse()
    place = start(args)
    began = time.perf_counter()
    losses = train(args, place)
    status = 0
    if place.whole is None or dist.get_rank() == 0:
        world = 1 if place.whole is None else dist.get_world_size()
        print(f"{args.steps} steps on {world} process(es): {time.perf_counter() - began:.1f} s")
        if args.plot:
            _common.draw(losses, args.plot, f"train_hybrid, {world} process(es)")
        if args.compare:
            args.save = args.resume = None
            alone = train(args, Place(place.device))
            difference = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
            print(f"largest difference of the loss from one process: {difference:.1e}")
            status = int(not difference <= 1e-4)
    if place.whole is not None:
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
