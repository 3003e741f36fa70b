"""The planner against this machine: steps of a small transformer, predicted and measured.

usp plan --calibrate --devices 4
usp bench predicted --processes 4
usp bench predicted --processes 4 --json result.json

Each mesh of so many local processes trains a transformer for some steps: seconds are the median of
the slowest rank's, bytes those that usp.testing.WireBytes counts, memory the most that
usp.testing.StorageBytes sees. Beside each stands what `usp plan` predicts for the cluster "here".
Let nothing else run: the machine was calibrated with all processes busy.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import usp
from usp.distributed.comm import join_locally
from usp.distributed.processes import Tell
from usp.distributed.processes import run as run_processes
from usp.planning.choose.cluster import CLUSTERS
from usp.planning.choose.here import measured_here
from usp.planning.choose.job import Choice, Job, Precision
from usp.planning.choose.model import Model
from usp.planning.choose.search import predict
from usp.testing import StorageBytes, WireBytes

FP32 = Precision(weights=4, gradients=4, optimizer=8, element=4, matrix="fp32")


@dataclass(frozen=True)
class Size:
    """Of the transformer and its batch."""

    layers: int = 4
    hidden: int = 512
    heads: int = 8
    mlp: int = 2048
    tokens: int = 2048
    causal: bool = False

    @property
    def model(self) -> Model:
        numbers = self.layers, self.hidden, self.heads, self.heads, self.mlp
        return Model("measured", *numbers, gated=False, causal=self.causal)


class Block(nn.Module):
    """A layer without biases and weights of norms, which the planner does not count."""

    def __init__(self, size: Size, attention: nn.Module) -> None:
        super().__init__()
        self.heads, self.attention = size.heads, attention
        h, f = size.hidden, size.mlp
        self.q, self.k, self.v, self.out = (nn.Linear(h, h, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(h, f, bias=False), nn.Linear(f, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:])
        q, k, v = (linear(y).unflatten(-1, (self.heads, -1)) for linear in (self.q, self.k, self.v))
        x = x + self.out(self.attention(q, k, v).flatten(-2))
        y = F.layer_norm(x, x.shape[-1:])
        return x + self.down(F.gelu(self.up(y)))


def job_of(size: Size, devices: int, batch: int = 1) -> Job:
    """On this machine if it was calibrated, else on the laptop that the planner assumes."""
    cluster = measured_here() or replace(CLUSTERS["laptop"], node=devices)
    return Job(size.model, size.tokens, batch, cluster, devices, precision=FP32, fused=False)


def choices(processes: int, size: Size) -> list[Choice]:
    """Meshes of the sequence alone; data ranks are others' work."""
    found = []
    for ulysses in (n for n in range(1, processes + 1) if not processes % n):
        ring = processes // ulysses
        layout = "zigzag" if size.causal and ring > 1 else "contiguous"
        found += [
            Choice(ring=ring, ulysses=ulysses, layout=layout, transport=transport)
            for transport in (("ring", "allgather") if ring > 1 else ("ring",))
        ]
    return found


def measure(size: Size, choice: Choice, steps: int) -> dict[str, float]:
    """On a rank: seconds of a step, bytes of attention and of gradients, most bytes of memory."""
    mesh = usp.init_mesh(choice.ulysses, choice.ring, device_type="cpu")
    torch.manual_seed(0)
    x = torch.randn(1, size.tokens, size.hidden)
    x = usp.shard_sequence(x, mesh, dim=1, layout=choice.layout).clone()
    attention = usp.LongContextAttention(
        mesh,
        causal=size.causal,
        layout=choice.layout,
        transport=choice.transport,
        seq_len=size.tokens,
        validate="never",
    )
    # who listens sees attention as one op, which also saves what it was given
    unseen = mock.patch("usp.attention.functional._is_watched", return_value=False)
    with unseen, StorageBytes() as memory:
        model = nn.Sequential(*(Block(size, attention) for _ in range(size.layers)))
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

        def step() -> None:
            optimizer.zero_grad()
            model(x).sum().backward()
            usp.all_reduce_gradients(model, mesh)
            optimizer.step()

        step()
        step()
    with WireBytes() as wire:
        model(x).sum().backward()
    with WireBytes() as reduced:
        usp.all_reduce_gradients(model, mesh)
    with WireBytes() as meeting:
        usp.all_reduce_gradients([], mesh)
    seconds = []
    for _ in range(steps):
        mesh.gather_numbers(0)
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": sorted(seconds)[steps // 2],
        "attention": wire.sent,
        "gradients": reduced.sent - meeting.sent,
        "memory": memory.peak,
    }


def _on_rank(settings: tuple[str, int, Size, Choice, int], rank: int, _: Tell) -> dict[str, float]:
    store, processes, size, choice, steps = settings
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    join_locally(store, rank, processes, 300.0)
    try:
        return measure(size, choice, steps)
    finally:
        torch.distributed.destroy_process_group()


def compared(size: Size, choice: Choice, found: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The busiest rank's numbers beside the prediction."""
    told = predict(job_of(size, choice.devices), choice)
    each = {
        "seconds": told.time.total,
        "attention": told.sent.attention,
        "gradients": told.sent.states,
        "memory": told.memory.total,
    }
    return {
        **vars(choice),
        "measured": {name: max(rank[name] for rank in found) for name in each},
        "predicted": each,
        "parts": told.time.parts,
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    for name, value in vars(Size()).items():
        if name != "causal":
            parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if measured_here() is None:
        raise SystemExit(f"first: usp plan --calibrate --devices {args.processes}")
    size = Size(**{name: getattr(args, name) for name in vars(Size())})
    records = []
    print(f"{'mesh':34}{'seconds':>10}{'predicted':>11}{'ratio':>7}{'memory':>8}{'bytes':>7}")
    for choice in choices(args.processes, size):
        with tempfile.TemporaryDirectory() as folder:
            settings = str(Path(folder, "store")), args.processes, size, choice, args.steps
            found = run_processes(_on_rank, settings, args.processes, lambda *_: None, 1200.0)
        record = compared(size, choice, found)
        records.append(record)
        real, told = record["measured"], record["predicted"]
        ratio = {name: told[name] / real[name] if real[name] else 1.0 for name in told}
        mesh = f"ring {choice.ring} ulysses {choice.ulysses} {choice.layout} {choice.transport}"
        print(
            f"{mesh:34}{real['seconds']:10.4f}{told['seconds']:11.4f}{ratio['seconds']:7.2f}"
            f"{ratio['memory']:8.3f}{ratio['attention']:7.3f}"
        )
    if args.json:
        cluster = vars(measured_here()) | {"levels": [vars(x) for x in measured_here().levels]}
        args.json.write_text(json.dumps({"cluster": cluster, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
