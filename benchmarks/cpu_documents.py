"""What new documents in every batch cost a training step: planning, and whatever else is new.

usp bench cpu_documents --json result.json

Four gloo processes of one thread each train a causal language model on packed documents, ring of
four, zigzag inside each document. Steps with documents drawn anew and steps whose documents never
change are taken in turn, a barrier before each; the slowest rank counts. Planning is timed inside
the new steps: what of each rank's step passes in it. Nothing is timed where the gradients of a
step differ from those of one process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import usp
from usp.attention import executors
from usp.bench import world as worlds
from usp.bench.machine import introduce
from usp.bench.records import write_report
from usp.bench.world import World
from usp.distributed.processes import Tell

MESH, PROCESSES, CORES = (1, 4), 4, 2  # ulysses x ring
BYTES, ALLOWED = 256, 1e-4


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mesh: usp.SequenceMesh | None) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.attention = usp.LongContextAttention(mesh, causal=True)

    def forward(self, x: Tensor, spread: usp.Spread) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.out(self.attention(q, k, v, spread=spread).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    def __init__(self, args: argparse.Namespace, mesh: usp.SequenceMesh | None) -> None:
        super().__init__()
        width = args.heads * args.head_dim
        self.mesh, self.table = mesh, nn.Embedding(BYTES, width)
        self.blocks = nn.ModuleList(Block(width, args.heads, mesh) for _ in range(args.layers))
        self.head = nn.Linear(width, BYTES)

    def forward(self, tokens: Tensor, documents: tuple[int, ...]) -> Tensor:
        """This rank's part of the mean loss of the next token.

        Args:
            tokens: (1, all tokens).
        """
        layout = usp.DocumentZigzag(documents)
        spread = usp.Spread(self.mesh, layout=layout, seq_len=documents[-1], cu_seqlens=documents)
        x = self.table(spread.shard(tokens))
        for block in self.blocks:
            x = block(x, spread)
        last = torch.tensor(documents[1:]) - 1
        targets = tokens.roll(-1, 1).index_fill(1, last, -100)
        wanted = spread.shard(targets).flatten()
        total = F.cross_entropy(self.head(x).flatten(0, 1), wanted, reduction="sum")
        return total / (documents[-1] - len(last))


def draw(length: int, mean: int, random: torch.Generator) -> tuple[int, ...]:
    """Boundaries of documents of any length, the same on all ranks."""
    cuts = torch.randperm(length - 1, generator=random)[: max(1, length // mean - 1)] + 1
    return (0, *cuts.sort().values.tolist(), length)


@contextmanager
def planning(spent: list[float]) -> Iterator[None]:
    """Add what passes in planning to ``spent[-1]``."""
    make = executors.make_plan

    def timed(*what: Any) -> Any:
        start = time.perf_counter()
        plan = make(*what)
        spent[-1] += time.perf_counter() - start
        return plan

    executors.make_plan = timed  # type: ignore[assignment]
    try:
        yield
    finally:
        executors.make_plan = make


def check(args: argparse.Namespace, model: Model, documents: tuple[int, ...]) -> float:
    """The largest error of all gradients of a step against those of one process."""
    alone = Model(args, None)
    alone.load_state_dict(model.state_dict())
    tokens = torch.randint(BYTES, (1, args.seq_len), generator=torch.Generator().manual_seed(1))
    for each in (model, alone):
        each(tokens, documents).backward()
    usp.all_reduce_gradients(model, model.mesh)
    return max(
        error(name, ours.grad, whole.grad)
        for (name, ours), whole in zip(model.named_parameters(), alone.parameters(), strict=True)
    )


def error(name: str, ours: Tensor | None, whole: Tensor | None) -> float:
    """The largest of a gradient, as a share of its largest value; a wrong one is an end."""
    assert ours is not None and whole is not None
    found = float((ours - whole).abs().max() / whole.abs().max())
    if not found <= ALLOWED:
        sys.exit(f"gradient of {name}: off by {found:.1e}, allowed {ALLOWED:.0e}: not timed")
    return found


def measure_all(world: World, rank: int, tell: Tell) -> dict[str, Any]:
    """On each process."""
    with worlds.joined(world, rank):
        return measure(world.args, worlds.mesh(MESH, "cpu"))


def measure(args: argparse.Namespace, mesh: usp.SequenceMesh) -> dict[str, Any]:
    torch.manual_seed(0)
    model, random = Model(args, mesh), torch.Generator().manual_seed(2)
    fixed = draw(args.seq_len, args.mean, random)
    largest = check(args, model, fixed)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    spent: list[float] = []

    def step(documents: Callable[[], tuple[int, ...]]) -> None:
        tokens = torch.randint(BYTES, (1, args.seq_len), generator=random)
        optimizer.zero_grad()
        model(tokens, documents()).backward()
        usp.all_reduce_gradients(model, mesh)
        optimizer.step()

    def new() -> None:
        spent.append(0.0)
        with planning(spent):
            step(lambda: draw(args.seq_len, args.mean, random))

    times = worlds.turns(
        {"new documents": new, "the same": lambda: step(lambda: fixed)},
        args.rounds,
        args.seconds,
    )
    shares = [a / b for a, b in zip(spent[1:], times.seconds["new documents"], strict=True)]
    found = {
        "documents": len(fixed) - 1,
        "planning_share": statistics.median(shares),
        "planning_seconds": spent[1:],
        "new_over_same": times.ratio("new documents", "the same"),
        "seconds": times.seconds,
        "error": largest,
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seq-len", type=int, default=8192)
    add("--mean", type=int, default=512, help="tokens of a document in the mean")
    add("--heads", type=int, default=8)
    add("--head-dim", type=int, default=64)
    add("--layers", type=int, default=2)
    add("--rounds", type=int, default=9)
    add("--seconds", type=float, default=120.0, help="after which no further round begins")
    add("--json", type=Path, help="write every time taken there")
    args = parser.parse_args()
    args.device, args.cores = "cpu", CORES
    about = introduce("cpu_documents")
    ranks = worlds.in_processes(measure_all, args, PROCESSES)
    slowest = max(ranks, key=lambda found: float(found["planning_share"]))
    planned = 1e3 * statistics.median(slowest["planning_seconds"])
    taken = statistics.median(slowest["seconds"]["new documents"])
    print(
        f"\n{args.seq_len} tokens, {slowest['documents']} documents, {args.layers} layers of "
        f"{args.heads} heads of {args.head_dim}, fp32\n"
        f"a step: {taken:.3f} s, of which planning {planned:.2f} ms, "
        f"{100 * slowest['planning_share']:.2f} % (the rank with most)\n"
        f"new documents over the same ones: {slowest['new_over_same']:.3f}"
    )
    write_report(args.json, about, ranks=ranks, settings=_told(args))


def _told(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name != "json"}


if __name__ == "__main__":
    main()
