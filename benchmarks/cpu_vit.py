"""A vision transformer as torch has it, and with its attention replaced: inference and training.

usp bench cpu_vit --json result.json

The model is a ViT (pre-norm, nn.MultiheadAttention without weights, MLP of 4), one image a batch,
197 to 4097 tokens; its twin holds the very weights after usp.replace_attention(model, None). Both
run in turn; a ratio is the median over rounds of time(torch) / time(usp), above 1 where usp is
faster. Nothing is timed where their losses or gradients differ.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import usp
from usp.bench.machine import introduce
from usp.bench.records import write_report
from usp.bench.timing import interleave

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative error of the gradient of all parameters together, above which nothing is timed.
ALLOWED = {"fp32": 1e-4, "bf16": 5e-2}


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class ViT(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, patch: int = 48) -> None:
        super().__init__()
        self.patches = nn.Linear(patch, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, patch) -> (B, 10)."""
        return self.head(self.blocks(self.patches(x))[:, 0])


@torch.inference_mode()
def infer(model: ViT, x: Tensor) -> None:
    model.eval()(x)


def step(model: ViT, x: Tensor) -> None:
    """A training step without its optimizer: gradients in the parameters."""
    model.train().zero_grad()
    model(x).float().square().mean().backward()


PHASES: dict[str, Callable[[ViT, Tensor], None]] = {"eval": infer, "training": step}


def check(name: str, whole: ViT, ours: ViT, dtype: str) -> float:
    """The error of all gradients together; ends the program where it is too large."""
    theirs, found = (
        torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
        for model in (whole, ours)
    )
    error = float((found - theirs).norm() / theirs.norm())
    if not error <= ALLOWED[dtype]:
        sys.exit(
            f"{name}: gradients are off by {error:.1e}, allowed {ALLOWED[dtype]:.0e}: not timed"
        )
    return error


def measure(tokens: int, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    whole = ViT(args.width, args.heads, args.layers).to(DTYPES[dtype])
    ours = usp.replace_attention(copy.deepcopy(whole), None)
    x = torch.randn(args.batch, tokens, 48).to(DTYPES[dtype])
    for model in (whole, ours):
        step(model, x)
    error = check(f"{tokens} tokens, {dtype}", whole, ours, dtype)
    found: dict[str, Any] = {"tokens": tokens, "dtype": dtype, "error": error}
    for phase, run in PHASES.items():
        models = {"torch": whole, "usp": ours}
        candidates = {name: partial(run, model, x) for name, model in models.items()}
        times = interleave(candidates, args.rounds, args.seconds)
        found[phase] = {"ratio": times.ratio("torch", "usp"), "seconds": times.seconds}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", nargs="+", type=int, default=[197, 1025, 4097])
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--width", type=int, default=384)
    add("--heads", type=int, default=6)
    add("--layers", type=int, default=4)
    add("--batch", type=int, default=1)
    add("--rounds", type=int, default=11)
    add("--seconds", type=float, default=20.0, help="after which a case gets no further round")
    add("--json", type=Path, help="write every time taken there")
    args = parser.parse_args()
    about = introduce("cpu_vit")
    print(f"\n{args.layers} layers, {args.heads} heads of {args.width // args.heads}\n")
    print("tokens  dtype   torch / usp: eval  training   error")
    results = []
    for tokens, dtype in itertools.product(args.tokens, args.dtypes):
        found = measure(tokens, dtype, args)
        ratios = [found[phase]["ratio"] for phase in PHASES]
        print(
            f"{tokens:6}  {dtype:5} {ratios[0]:19.2f} {ratios[1]:9.2f}   {found['error']:.1e}",
            flush=True,
        )
        results.append(found)
    every = [math.log(r[phase]["ratio"]) for r in results for phase in PHASES]
    print(f"geometric mean {math.exp(sum(every) / len(every)):.2f}")
    write_report(args.json, about, models=results)


if __name__ == "__main__":
    main()
