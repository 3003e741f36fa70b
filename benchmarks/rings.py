"""Rings: queries that travel back, two levels, and latents, against the plain ring of keys.

usp bench rings --quick
usp bench rings --json result.json          (contexts of 4096 and 16384 tokens)

Four gloo processes of one thread each, on two cores, each with a quarter of the tokens; causal
attention in the zigzag layout, forward and backward. "keys" passes keys on and their gradients
home; "queries" sends queries in the backward; "two levels" passes keys over 2 nodes of 2 processes;
"grid" sends keys between these and queries inside; "made keys" makes MLA's keys and values of
latents first and passes those, "latents" passes the latents. They run in turn in both orders, a
barrier before each; the slowest rank counts. A ratio is the median over rounds of time(keys) /
time(this), or of "made keys" for "latents". The bytes are those that usp.testing.WireBytes counts
of rank 0; "crossing" those of all ranks between the nodes, by the formula. Nothing is timed where
bytes are not the formula's, or where a result differs from fp64 on one process. All links of one
machine are alike: what fewer bytes between nodes are worth shows on others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import usp
from usp.bench import world as worlds
from usp.bench.device import DTYPES
from usp.bench.exact import relative_error
from usp.bench.machine import introduce
from usp.bench.records import write_report
from usp.bench.world import World
from usp.distributed.processes import Tell
from usp.masks import causal
from usp.planning.cost import Place, Shape, bytes_between_nodes, bytes_sent
from usp.testing import WireBytes

MESH, PROCESSES, CORES, NODES = (1, 4), 4, 2, 2  # ulysses x ring
# Relative rms error against fp64 above which nothing is timed.
ALLOWED = {"fp32": 1e-5, "bf16": 2e-2}
# transport, nodes, whether latents travel
WAYS = {
    "keys": ("ring", 1, False),
    "queries": ("query_ring", 1, False),
    "two levels": ("ring", NODES, False),
    "grid": ("grid", NODES, False),
    "made keys": ("ring", 1, False),
    "latents": ("ring", 1, True),
}
BASE = {"queries": "keys", "two levels": "keys", "grid": "keys", "latents": "made keys"}


@dataclass(frozen=True)
class RingCase:
    """Sizes of one attention: ``heads`` of queries and of keys alike."""

    dtype: str
    context: int
    heads: int
    head_dim: int
    rope_dim: int
    latent_dim: int

    def bytes_of(self, name: str, rank: int) -> tuple[int, int]:
        """What a rank sends, and what of it leaves a node of two ranks, by the formulas."""
        transport, nodes, travel = WAYS[name]
        rope = self.rope_dim if name in ("made keys", "latents") else 0
        dims = self.head_dim + rope, self.head_dim
        width = self.latent_dim + self.rope_dim if travel else None
        lengths, heads = (self.context,) * 2, (self.heads,) * 2
        shape = Shape(1, *lengths, *heads, *dims, DTYPES[self.dtype], latent_width=width)
        place = Place(PROCESSES, 1, rank, 0, "zigzag", causal(), transport, nodes)
        passes = False, True
        return (
            sum(bytes_sent(shape, place, back).total for back in passes),
            sum(bytes_between_nodes(shape, place, NODES, back).total for back in passes),
        )


def measure_all(world: World, rank: int, tell: Tell) -> list[dict[str, Any]]:
    """On each process: every case; the results of rank 0 are those of all."""
    with worlds.joined(world, rank):
        return measure(world.args, worlds.mesh(MESH, "cpu"))


def measure(args: argparse.Namespace, mesh: usp.SequenceMesh) -> list[dict[str, Any]]:
    levels = usp.init_mesh(1, PROCESSES, ring_outer_degree=NODES, device_type="cpu")
    results = []
    for dtype in args.dtypes:
        for context in args.contexts:
            sizes = args.heads, args.head_dim, args.rope_dim, args.latent_dim
            case = RingCase(dtype, context, *sizes)
            results.append(measured(case, args, {1: mesh, NODES: levels}))
            if dist.get_rank() == 0:
                print_rows(results[-1])
    return results


def measured(
    case: RingCase, args: argparse.Namespace, meshes: dict[int, usp.SequenceMesh]
) -> dict[str, Any]:
    ways, sent, found, rank = candidates(case, meshes), {}, {}, dist.get_rank()
    exact = {name: candidate(case, name, None, torch.float64)() for name in ("keys", "latents")}
    for name, way in ways.items():
        with WireBytes() as wire:
            results = way()
        sent[name] = wire.sent
        if sent[name] != case.bytes_of(name, rank)[0]:
            raise ValueError(f"{name}: {sent[name]} bytes left rank {rank}, not as by the formula")
        family = "latents" if name in ("made keys", "latents") else "keys"
        wanted = [usp.shard_sequence(x, meshes[1], 1, "zigzag") for x in exact[family]]
        found[name] = max(relative_error(*pair) for pair in zip(results, wanted, strict=True))
    check(case, found)
    times = worlds.turns(ways, args.rounds, args.seconds)
    crossing = {name: sum(case.bytes_of(name, r)[1] for r in range(PROCESSES)) for name in ways}
    return {
        **asdict(case),
        "bytes_sent": sent,
        "crossing": crossing,
        "ratios": {name: times.ratio(base, name) for name, base in BASE.items()},
        "errors": found,
        "seconds": times.seconds,
        "median_seconds": {name: times.median(name) for name in ways},
    }


def candidates(
    case: RingCase, meshes: dict[int, usp.SequenceMesh]
) -> dict[str, Callable[[], list[Tensor]]]:
    dtype = DTYPES[case.dtype]
    return {name: candidate(case, name, meshes[WAYS[name][1]], dtype) for name in WAYS}


def candidate(
    case: RingCase, name: str, mesh: usp.SequenceMesh | None, dtype: torch.dtype
) -> Callable[[], list[Tensor]]:
    """out and the gradients of q and of what travels, one way, of this rank's tokens."""
    torch.manual_seed(0)
    transport, _, travel = WAYS[name]
    n, h, d, rope, width = case.context, case.heads, case.head_dim, case.rope_dim, case.latent_dim
    shapes = [(1, n, h, d)] * 3
    if name in ("made keys", "latents"):
        shapes = [(1, n, h, d + rope), (1, n, width), (1, n, rope)]
    given = DTYPES[case.dtype]  # rounded alike for the exact result
    whole = [torch.randn(shape).to(given).to(dtype) for shape in (*shapes, (1, n, h, d))]
    *leaves, dout = (usp.shard_sequence(x, mesh, 1, "zigzag").detach() for x in whole)
    leaves = [x.requires_grad_() for x in leaves]
    up_k, up_v = (torch.randn(h, d, width) * width**-0.5 for _ in range(2))
    up = [x.to(given).to(dtype).requires_grad_() for x in (up_k, up_v)]
    options: dict[str, Any] = {"causal": True, "layout": "zigzag", "seq_len": n}
    options |= {"transport": transport, "validate": False}

    def run() -> list[Tensor]:
        if travel:
            out = usp.latent_attention(*leaves, *up, mesh, **options)
        elif name == "made keys":
            q, latent, rope_key = leaves
            k_nope, v = (torch.einsum("bnc,hdc->bnhd", latent, weight) for weight in up)
            k = torch.cat((k_nope, rope_key[:, :, None].expand(-1, -1, h, -1)), -1)
            out = usp.long_context_attention(q, k, v, mesh, **options)
        else:
            out = usp.long_context_attention(*leaves, mesh, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    return run


def check(case: RingCase, errors: dict[str, float]) -> None:
    for name, error in errors.items():
        if not error <= ALLOWED[case.dtype]:
            raise ValueError(
                f"{case}: {name} is off by {error:.2e}, more than {ALLOWED[case.dtype]:.0e}: not "
                "timed"
            )


def print_rows(result: dict[str, Any]) -> None:
    for name, seconds in result["median_seconds"].items():
        sent, crossing = (result[what][name] / 1e6 for what in ("bytes_sent", "crossing"))
        ratio = f"{result['ratios'][name]:10.2f}" if name in BASE else ""
        line = f"{result['dtype']:6}{result['context']:8} {name:12}{1e3 * seconds:10.1f}"
        print(f"{line}{sent:10.3f}{crossing:10.3f}{ratio}", flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--contexts", type=int, nargs="+", default=[4096, 16384], help="tokens")
    add("--heads", type=int, default=4, help="of queries and of keys")
    add("--head-dim", type=int, default=64)
    add("--rope-dim", type=int, default=32)
    add("--latent-dim", type=int, default=128)
    add("--dtypes", nargs="+", choices=ALLOWED, default=["fp32", "bf16"])
    add("--rounds", type=int, default=9, help="of each case, at most")
    add("--seconds", type=float, default=60.0, help="after which a case gets no further round")
    add("--quick", action="store_true", help="1024 tokens, 3 rounds")
    add("--json", type=Path, help="write every time taken there")
    args = parser.parse_args(argv)
    args.device, args.cores = "cpu", CORES
    if args.quick:
        args.contexts, args.rounds = [1024], 3
    return args


def main() -> None:
    args = parse()
    about = introduce("rings")
    print(
        f"\n{args.heads} heads of {args.head_dim}, MLA of {args.latent_dim} + {args.rope_dim}; "
        "ms of a forward with its backward, MB that leave rank 0, MB of all ranks between nodes\n"
        "dtype context way               ms   sent MB  crossing      time"
    )
    results = worlds.in_processes(measure_all, args, PROCESSES)[0]
    write_report(args.json, about, cases=results)


if __name__ == "__main__":
    main()
