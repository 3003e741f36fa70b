"""The planner against this machine: steps of a small transformer, predicted and measured.

usp bench predicted --processes 1 2 4
usp bench predicted --processes 1 2 4 --json result.json
usp bench predicted --processes 2 --kept             (after usp plan --calibrate --devices 2)

For each number of local processes the machine is measured, as usp plan --calibrate does it, with
the links of usp bench comm; then each mesh of them trains a transformer for some steps: seconds are
the median of the slowest rank's, bytes those that usp.testing.WireBytes counts, memory the most
that usp.testing.StorageBytes sees. Beside each stands what `usp plan` predicts. Let nothing else
run: the machine is measured with all processes busy. Exit code 1 where seconds are off by more than
20 %, memory by more than 10 %, or bytes by any.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import usp
from usp import bench as usp_bench
from usp.bench.machine import header
from usp.bench.memory import attention_runs
from usp.bench.records import write_report
from usp.cli import calibrate
from usp.distributed.comm import join_locally
from usp.distributed.processes import Tell
from usp.distributed.processes import run as run_processes
from usp.planning.choose.cluster import CLUSTERS, Cluster
from usp.planning.choose.here import cluster_from, measured_here
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


def job_of(size: Size, devices: int, cluster: Cluster | None = None) -> Job:
    """On this machine if it was measured, else on the laptop that the planner assumes."""
    cluster = cluster or measured_here() or replace(CLUSTERS["laptop"], node=devices)
    return Job(size.model, size.tokens, 1, cluster, devices, precision=FP32, fused=False)


def measured_now(processes: int, quick: bool) -> Cluster:
    """This machine with so many processes, its links as ``usp bench comm`` measures them."""
    found = calibrate.measure(processes)
    if processes > 1:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "comm.json")
            argv = ["--processes", str(processes), "--json", str(file), *["--quick"] * quick]
            if usp_bench.run("comm", argv):
                raise SystemExit("usp bench comm: not every verb was right")
            found["levels"][0] |= calibrate.links_of(file)[1]
    return cluster_from(found)


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
    with attention_runs(as_op=False), StorageBytes() as memory:
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


def compared(
    size: Size,
    choice: Choice,
    found: Sequence[dict[str, float]],
    cluster: Cluster | None = None,
) -> dict[str, Any]:
    """The busiest rank's numbers beside the prediction."""
    told = predict(job_of(size, choice.devices, cluster), choice)
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
    parser.add_argument("--processes", type=int, nargs="+", default=[2], metavar="N")
    for name, value in vars(Size()).items():
        if name != "causal":
            parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--kept", action="store_true", help="as usp plan --calibrate has kept it")
    parser.add_argument("--quick", action="store_true", help="measure links in less time")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


# How far a prediction may be from what was measured.
ALLOWED = {"seconds": 0.2, "memory": 0.1, "attention": 0.0}


def ratios(record: dict[str, Any]) -> dict[str, float]:
    """Predicted over measured."""
    real, told = record["measured"], record["predicted"]
    return {name: told[name] / real[name] if real[name] else 1.0 for name in ALLOWED}


def on_processes(size: Size, processes: int, cluster: Cluster, steps: int) -> list[dict[str, Any]]:
    """Every mesh of them, shown as it is done."""
    records = []
    for choice in choices(processes, size):
        with tempfile.TemporaryDirectory() as folder:
            settings = str(Path(folder, "store")), processes, size, choice, steps
            found = run_processes(_on_rank, settings, processes, lambda *_: None, 1200.0)
        record = compared(size, choice, found, cluster)
        records.append(record)
        real, told, ratio = record["measured"], record["predicted"], ratios(record)
        mesh = f"ring {choice.ring} ulysses {choice.ulysses} {choice.layout} {choice.transport}"
        print(
            f"{processes:>9} {mesh:34}{real['seconds']:10.4f}{told['seconds']:11.4f}"
            f"{ratio['seconds']:7.2f}{ratio['memory']:8.3f}{ratio['attention']:7.3f}",
            flush=True,
        )
    return records


def main() -> int:
    args = parse()
    size = Size(**{name: getattr(args, name) for name in vars(Size())})
    records, clusters = [], []
    for processes in args.processes:
        cluster = measured_here() if args.kept else measured_now(processes, args.quick)
        if cluster is None or cluster.node != processes:
            raise SystemExit(f"first: usp plan --calibrate --devices {processes}")
        clusters.append(vars(cluster) | {"levels": [vars(link) for link in cluster.levels]})
        heads = ("seconds", 10), ("predicted", 11), ("ratio", 7), ("memory", 8), ("bytes", 7)
        print(f"{'processes':>9} {'mesh':34}" + "".join(f"{name:>{w}}" for name, w in heads))
        records += on_processes(size, processes, cluster, args.steps)
    about = header("predicted", "cpu", vars(args), "wall")
    write_report(args.json, about, cluster=clusters, mesh=records)
    off = [
        name for record in records for name, ratio in ratios(record).items()
        if abs(ratio - 1) > ALLOWED[name]
    ]  # fmt: skip
    print(f"of {len(records)} meshes off: {', '.join(off) if off else 'nothing'}")
    return 1 if off else 0


if __name__ == "__main__":
    raise SystemExit(main())
