"""An MLP and a loss in tiles of tokens: peak memory and time against the number of tiles.

usp bench tiles --quick
usp bench tiles --json result.json --plot tiles.png
usp bench tiles --from result.json --plot tiles.png      (draws, measures nothing)
usp bench tiles --device cuda --dtype bf16

The MLP is Llama's (gate, up, down), the loss that of a language model from its last hidden states;
a call is a forward and a backward, plain and with each number of tiles. On a CPU the peak is that
of the storages that live at a time beside parameters and inputs, gradients among them, counted by
usp.testing.StorageBytes: the same on every machine. On a GPU it is what torch's allocator says.
Where DeepSpeed is installed, its TiledMLP and TiledFusedLogitsLoss stand beside ours, with as many
tiles. Times are taken in turn, in both orders; "over plain" is the median over rounds of
time(tiles) / time(plain). Nothing is timed whose gradients are further from fp64 than the plain
ones'. Where Liger is installed, its fused loss stands beside ours: on a GPU timed, on a CPU with
TRITON_INTERPRET=1 its memory alone.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import usp
from usp.bench.machine import header
from usp.bench.records import read, write_report
from usp.bench.timing import CLOCKS, take_turns
from usp.testing import StorageBytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SUBJECTS = {"mlp": "MLP", "loss": "loss"}
Step = Callable[[], object]


class Gated(nn.Module):
    """The MLP of Llama."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@dataclass(frozen=True)
class Subject:
    """What is computed.

    Attributes:
        leaves: What has a gradient.
        steps: Forward and backward, by name: "plain", a number of tiles, "liger".
        exact: The plain one in fp64.
    """

    leaves: tuple[Tensor, ...]
    steps: dict[str, Step]
    exact: tuple[Tensor, ...]


def mlp(args: argparse.Namespace) -> Subject:
    module = Gated(args.width, args.inner).to(args.device, DTYPES[args.dtype])
    x = torch.randn(1, args.tokens, args.width, device=args.device).to(DTYPES[args.dtype])
    dout = torch.randn_like(x)
    x.requires_grad_()

    def step(tiles: int | None) -> None:
        out = module(x) if tiles is None else usp.tiled_mlp(module, x, tiles)
        out.backward(dout)

    twin = Gated(args.width, args.inner).to(args.device, torch.float64)
    twin.load_state_dict(module.state_dict())
    y = x.detach().double().requires_grad_()
    twin(y).backward(dout.double())
    leaves = (x, *module.parameters())
    found = steps(step, args)
    theirs = deepspeed()
    if theirs is not None:

        def their_step(tiles: int) -> None:
            theirs.TiledMLP.apply(Gated.forward, module, x, tiles, []).backward(dout)

        found |= {f"deepspeed {tiles}": partial(their_step, tiles) for tiles in args.tiles}
    return Subject(leaves, found, grads((y, *twin.parameters())))


def loss(args: argparse.Namespace) -> Subject:
    dtype = DTYPES[args.dtype]
    x = torch.randn(args.tokens, args.width, device=args.device).to(dtype).requires_grad_()
    weight = torch.randn(args.classes, args.width, device=args.device) * args.width**-0.5
    weight = weight.to(dtype).requires_grad_()
    labels = torch.randint(args.classes, (args.tokens,), device=args.device)
    labels[::7] = -100

    def step(tiles: int | None) -> None:
        if tiles is None:
            F.cross_entropy(F.linear(x, weight).float(), labels).backward()
        else:
            usp.tiled_cross_entropy(x, weight, labels, tiles=tiles).backward()

    y, w = (each.detach().double().requires_grad_() for each in (x, weight))
    F.cross_entropy(F.linear(y, w), labels).backward()
    found = steps(step, args)
    theirs = deepspeed()
    if theirs is not None:
        count = int((labels != -100).sum())

        def summed(_: None, x: Tensor, labels: Tensor) -> Tensor:
            logits = F.linear(x, weight).float().view(-1, args.classes)
            return F.cross_entropy(logits, labels.flatten(), reduction="sum") / count

        def their_step(tiles: int) -> None:
            given = x[None], labels[None], None, tiles, [], "sum"
            theirs.TiledFusedLogitsLoss.apply(summed, None, *given).backward()

        found |= {f"deepspeed {tiles}": partial(their_step, tiles) for tiles in args.tiles}
    if liger_runs(args.device):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = lambda: fused(weight, x, labels).backward()
    return Subject((x, weight), found, grads((y, w)))


def steps(step: Callable[[int | None], None], args: argparse.Namespace) -> dict[str, Step]:
    plain: dict[str, Step] = {"plain": partial(step, None)}
    return plain | {str(tiles): partial(step, tiles) for tiles in args.tiles}


def deepspeed() -> Any:
    """The module of DeepSpeed's tiled compute, where it can be imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        return importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")
    except ImportError:
        return None


def liger_runs(device: str) -> bool:
    there = importlib.util.find_spec("liger_kernel") is not None
    return there and (device != "cpu" or os.environ.get("TRITON_INTERPRET") == "1")


def grads(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Taken away from the leaves."""
    found = []
    for leaf in leaves:
        assert leaf.grad is not None
        found.append(leaf.grad)
        leaf.grad = None
    return tuple(found)


def error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The largest of all gradients, relative to fp64."""
    pairs = zip(found, exact, strict=True)
    return max(float((x.double() - y).norm() / y.norm()) for x, y in pairs)


def check(name: str, found: float, plain: float) -> None:
    """Ends the program where a way is wrong."""
    allowed = max(1.5 * plain, 16 * torch.finfo(torch.float32).eps)
    if not found <= allowed:
        sys.exit(f"{name}: gradients are off by {found:.1e}, the plain ones {plain:.1e}: not timed")


def peak(step: Step, device: str) -> int:
    """Bytes beside what was there."""
    if device == "cpu":
        with StorageBytes() as memory:
            step()
        return memory.peak
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def seconds(step: Step, args: argparse.Namespace, leaves: tuple[Tensor, ...]) -> float:
    for leaf in leaves:
        leaf.grad = None
    now = CLOCKS[args.clock]
    start = now()
    step()
    if args.device != "cpu":
        torch.cuda.synchronize()
    return now() - start


def measure(subject: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    case = {"mlp": mlp, "loss": loss}[subject](args)
    errors, peaks = {}, {}
    for name, step in list(case.steps.items()):
        try:
            peaks[name] = peak(step, args.device)
            errors[name] = error(grads(case.leaves), case.exact)
            check(f"{subject}, {name}", errors[name], errors["plain"])
        except (SystemExit, Exception) as refused:
            if not name.startswith("deepspeed"):
                raise
            print(f"{subject}: {name} is left out: {str(refused).partition(chr(10))[0]}")
            del case.steps[name]
            for leaf in case.leaves:
                leaf.grad = None
    candidates = {n: s for n, s in case.steps.items() if args.device != "cpu" or n != "liger"}
    take = partial(seconds, args=args, leaves=case.leaves)
    times = take_turns(candidates, args.rounds, args.seconds, take)
    return [
        {
            "subject": subject,
            "way": name,
            "peak_bytes": peaks[name],
            "peak_over_plain": peaks[name] / peaks["plain"],
            "error": errors[name],
            "time_over_plain": times.ratio(name, "plain") if name in candidates else None,
            "seconds": times.seconds.get(name),
        }
        for name in case.steps
    ]


def draw(report: dict[str, Any], file: Path) -> None:
    """A panel for the MLP and one for the loss: peak memory over the number of tiles."""
    from matplotlib.figure import Figure

    sizes, figure = report["sizes"], Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(SUBJECTS))
    for panel, (subject, label) in zip(panels, SUBJECTS.items(), strict=True):
        found = {
            r["way"]: r["peak_bytes"] / 2**20 for r in report["ways"] if r["subject"] == subject
        }
        tiles = [way for way in found if way.isdigit()]
        panel.plot([int(n) for n in tiles], [found[n] for n in tiles], "o-", label="in tiles")
        theirs = {int(way.split()[1]): size for way, size in found.items() if " " in way}
        if theirs:
            panel.plot(list(theirs), list(theirs.values()), "s--", label="DeepSpeed's tiles")
        panel.axhline(found["plain"], color="#d55e00", label="plain")
        if "liger" in found:
            panel.axhline(
                found["liger"], color="#009e73", linestyle="--", label="Liger's fused loss"
            )
        wide = f"inner {sizes['inner']}" if subject == "mlp" else f"{sizes['classes']} classes"
        panel.set_title(f"{label}: {sizes['tokens']} tokens, width {sizes['width']}, {wide}")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("tiles")
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    panels[0].set_ylabel(f"peak of forward and backward, MiB ({sizes['dtype']})")
    figure.savefig(file, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=int, default=4096)
    add("--width", type=int, default=256)
    add("--inner", type=int, default=1024, help="of the MLP")
    add("--classes", type=int, default=16384, help="of the loss")
    add("--tiles", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    add("--dtype", choices=DTYPES, default="fp32")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--rounds", type=int, default=5, help="at most, and 3 at least")
    add("--seconds", type=float, default=60.0, help="after which a subject gets no further round")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--clock", choices=CLOCKS, default="wall", help="cpu: on a busy machine, with --threads 1")
    add("--quick", action="store_true", help="512 tokens, 2048 classes, 3 rounds")
    add("--json", type=Path, help="write every figure there")
    add("--plot", type=Path, metavar="FILE.png", help="draw the peaks (needs matplotlib)")
    add("--from", dest="source", type=Path, metavar="FILE.json", help="draw these, measure nothing")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.classes, args.rounds = 512, 2048, 3
    return args


def main() -> None:
    args = parse()
    if args.source is not None:
        found = read(args.source)
        report = {"sizes": found.of("sizes")[0], "ways": found.of("ways")}
    else:
        torch.set_num_threads(args.threads)
        about = header("tiles", args.device, {}, args.clock)
        print("\n".join(f"{name}: {value}" for name, value in about.items()))
        names = ("tokens", "width", "inner", "classes", "dtype", "device")
        report = {"sizes": {name: getattr(args, name) for name in names}, "ways": []}
        print(
            f"\n{report['sizes']}\n\n"
            "subject  tiles          peak MiB  of plain   over plain    error"
        )
        for subject in SUBJECTS:
            for r in measure(subject, args):
                time = "      -" if r["time_over_plain"] is None else f"{r['time_over_plain']:7.2f}"
                print(
                    f"{subject:8} {r['way']:12} {r['peak_bytes'] / 2**20:10.1f} "
                    f"{r['peak_over_plain']:9.3f} {time:>11}  {r['error']:.1e}",
                    flush=True,
                )
                report["ways"].append(r)
        write_report(args.json, about, **report)
    if args.plot is not None:
        draw(report, args.plot)


if __name__ == "__main__":
    main()
