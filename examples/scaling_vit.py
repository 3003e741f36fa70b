"""How a vision transformer scales on images of CIFAR's shape: a study, its table and its plots.

The images are the digits in scikit-learn's wheel, enlarged to 32 x 32 pixels of three colours. One
launch measures with 1, 2, 4, ... of its processes, while the others wait:

    torchrun --nproc-per-node 4 examples/scaling_vit.py --json study.json
    python examples/scaling_vit.py --from study.json

What was measured is in the JSON; table (study.md) and plots (study.png) are made of it alone.

strong: one batch on more and more processes, which share tokens (ring, ulysses) or samples (data)
weak: as many tokens (smaller patches) or samples for each process, however many there are
batch: more samples a step, on all processes
accumulation: the same samples a step, in more and more parts
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import usp

PIXELS = 32
STUDIES, WAYS = ("strong", "weak", "batch", "accumulation"), ("ring", "ulysses", "data")
# of an image 64, 128, 256, 512 and 1024
PATCHES = ((4, 4), (4, 2), (2, 2), (2, 1), (1, 1))


@dataclass(frozen=True)
class Setting:
    """One line of the table; ``way`` is what the processes share."""

    study: str
    way: str
    ranks: int
    batch: int
    parts: int = 1
    patch: tuple[int, int] = PATCHES[0]

    def degree(self, way: str) -> int:
        return self.ranks if way == self.way else 1

    @property
    def tokens(self) -> int:
        return PIXELS // self.patch[0] * (PIXELS // self.patch[1])


def settings(world: int, batch: int) -> Iterator[Setting]:
    if batch % (4 * world):
        raise SystemExit(f"--batch {batch} is no multiple of {4 * world}, four for each process")
    counts = [2**n for n in range(len(PATCHES)) if world % 2**n == 0]
    for way in WAYS:
        for n, ranks in enumerate(counts):
            yield Setting("strong", way, ranks, batch)
            if way == "data":
                yield Setting("weak", way, ranks, batch // counts[-1] * ranks)
            else:
                yield Setting("weak", way, ranks, batch, patch=PATCHES[n])
        for more in (1, 2, 4):
            yield Setting("batch", way, counts[-1], batch * more)
            yield Setting("accumulation", way, counts[-1], batch, parts=more)


class VisionTransformer(nn.Module):
    """Images (B, 3, 32, 32) -> scores of ten digits."""

    def __init__(self, dim: int, depth: int, heads: int, setting: Setting) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, setting.patch, setting.patch)
        self.position = nn.Parameter(0.02 * torch.randn(setting.tokens, dim))
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, 0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(tokens).mean(1))


def digits() -> tuple[Tensor, Tensor]:
    """(1797, 3, 32, 32) pixels with mean 0 and variance 1, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None]
    pixels = F.interpolate((pixels - pixels.mean()) / pixels.std(), size=(PIXELS, PIXELS))
    return pixels.expand(-1, 3, -1, -1).contiguous(), torch.tensor(found.target)


def sharing(setting: Setting, kind: str) -> tuple[usp.SequenceMesh | None, Any, int] | None:
    """Who shares a sequence with this process, who has other samples, and this one's place among
    these; None for processes that wait. Groups are made by all of them."""
    if not dist.is_initialized():
        return None, None, 0
    teams = dist.get_world_size() // setting.ranks  # of which the first measures
    shape = teams, *(setting.degree(way) for way in ("data", "ring", "ulysses"))
    whole = init_device_mesh(kind, shape, mesh_dim_names=("team", "data", "ring", "ulysses"))
    mesh, data = usp.SequenceMesh.from_device_mesh(whole), whole["data"]
    is_waiting = whole.get_local_rank("team") > 0
    return None if is_waiting else (mesh, data.get_group(), data.get_local_rank())


def measured(setting: Setting, args: argparse.Namespace, images: Tensor, labels: Tensor) -> Any:
    """Seconds of a step and its losses; None on processes that wait."""
    place = sharing(setting, images.device.type)
    if place is None:
        return None
    mesh, column, row = place
    torch.manual_seed(0)
    model = VisionTransformer(args.dim, args.depth, args.heads, setting).to(images.device)
    usp.parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seconds, losses, data = [], [], setting.degree("data")
    for step in range(args.steps + 1):
        chosen = torch.arange(step * setting.batch, (step + 1) * setting.batch) % len(images)
        began = time.perf_counter()
        total = torch.zeros((), device=images.device)
        for part in chosen[row::data].chunk(setting.parts):
            # a mean over this process's samples; the mean over data ranks is taken of gradients
            loss = F.cross_entropy(model(images[part]), labels[part]) / setting.parts
            loss.backward()
            total += loss.detach()
        usp.all_reduce_gradients(model, mesh, column)
        optimizer.step()
        optimizer.zero_grad()
        if data > 1:
            dist.all_reduce(total, group=column)
        losses.append(float(total) / data)
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds[1:]), "losses": losses}  # the first warms up


def study(args: argparse.Namespace) -> None:
    """All settings, one behind the other; the first process writes them down."""
    device, world = torch.device("cpu"), 1
    if "RANK" in os.environ or "SLURM_PROCID" in os.environ:
        world = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
        device = torch.device(usp.init_mesh(1, world, device_type=args.device).device_type)
    images, labels = (x.to(device) for x in digits())
    is_first, runs = not dist.is_initialized() or dist.get_rank() == 0, []
    todo = sorted(settings(world, args.batch), key=lambda each: STUDIES.index(each.study))
    for n, setting in enumerate(todo, 1):
        found = measured(setting, args, images, labels)
        if is_first:
            runs.append(asdict(setting) | {"tokens": setting.tokens} | found)
            if sys.stderr.isatty():
                print(f"\r{n}/{len(todo)} settings", end="", file=sys.stderr)
        if dist.is_initialized():
            dist.barrier()
    if is_first:
        name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
        head = {"device": f"{device.type} {name or platform.machine()}", "processes": world}
        head |= {"torch": torch.__version__, "model": [args.dim, args.depth, args.heads]}
        Path(args.json).write_text(json.dumps(head | {"runs": runs}, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()


def efficiency(run: dict[str, Any], runs: list[dict[str, Any]]) -> float:
    """Of a strong or weak run, against one process: 1 is ideal."""
    key = "study", "way"
    (one,) = (r for r in runs if r["ranks"] == 1 and all(r[k] == run[k] for k in key))
    rate, alone = (r["batch"] * r["tokens"] / r["seconds"] / r["ranks"] for r in (run, one))
    return rate / alone


def spread_of_losses(runs: list[dict[str, Any]]) -> float:
    """The largest difference between runs of the same samples and tokens, which must agree."""
    found: dict[tuple[int, int], list[list[float]]] = {}
    for run in runs:
        found.setdefault((run["batch"], run["tokens"]), []).append(run["losses"])
    return max(max(c) - min(c) for same in found.values() for c in zip(*same, strict=True))


def table(told: dict[str, Any]) -> str:
    """Markdown."""
    runs = told["runs"]
    lines = [f"{told['device']}, {told['processes']} process(es), torch {told['torch']}", ""]
    lines += [
        "| study | shared | processes | batch | parts | tokens | s a step | images/s | efficiency |"
    ]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    for run in runs:
        scales = run["study"] in ("strong", "weak")
        cells = [run[name] for name in ("study", "way", "ranks", "batch", "parts", "tokens")]
        cells += [f"{run['seconds']:.4f}", f"{run['batch'] / run['seconds']:.1f}"]
        cells += [f"{efficiency(run, runs):.2f}" if scales else ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", f"Losses of the same samples and tokens differ by {spread_of_losses(runs):.1e}."]
    return "\n".join(lines) + "\n"


def plot(told: dict[str, Any], file: Path) -> None:
    """A picture of four: what each study varies, and images a second or the efficiency."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = told["runs"]
    figure, grid = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for axes, study, name in zip(
        grid.flat, STUDIES, ("ranks", "ranks", "batch", "parts"), strict=True
    ):
        for way in WAYS:
            mine = [run for run in runs if (run["study"], run["way"]) == (study, way)]
            rates = [run["batch"] / run["seconds"] for run in mine]
            ys = [efficiency(run, runs) for run in mine] if study == "weak" else rates
            axes.plot([run[name] for run in mine], ys, marker="o", label=way)
        ticks = sorted({run[name] for run in runs if run["study"] == study})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        label = "efficiency" if study == "weak" else "images/s"
        axes.set(title=study, xlabel=name.replace("ranks", "processes"), ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    grid[0, 0].legend(title="shared by")
    figure.suptitle(f"{told['device']}, {told['processes']} process(es)")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="study.json", help="where what is measured is written")
    parser.add_argument("--from", dest="made", metavar="JSON", help="measure nothing: report this")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="of each setting, behind a first one")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--device", help="cpu or cuda; by default a GPU for each process, if any")
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    if args.made is None:
        study(args)
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
            return 0
    file = Path(args.made or args.json)
    told = json.loads(file.read_text())
    file.with_suffix(".md").write_text(table(told))
    plot(told, file.with_suffix(".png"))
    print(table(told))
    return int(not spread_of_losses(told["runs"]) <= 1e-4)


if __name__ == "__main__":
    sys.exit(main())
