"""The CPU kernels against torch's own attention and its matrix product, as ratios.

usp bench cpu_attention --quick
usp bench cpu_attention --json result.json          (the whole grid: hours)
usp bench cpu_attention --quick --threads 1 --clock cpu   (a machine that others use too)

Candidates run in turn in one process with the same threads; a ratio is the median over rounds of
time(SDPA) / time(usp), above 1 where usp is faster. Each gets its own layout, contiguous: SDPA
(B, H, L, D), usp (B, L, H, D). SDPA gets a boolean mask for windows and documents and enable_gqa
for shared key heads. A call has 4096 tokens at least: short sequences come in batches. Nothing is
timed whose error against fp64 is above 1.25 times SDPA's own.

"of matmul" is usp's FLOP rate over that of torch.matmul (1024 x 1024 x 1024) taken in the same
rounds: in bf16 for bf16 inputs (BF16 instructions, where the machine has them), in fp32 for fp32
and fp16. FLOPs count visible pairs only: 4 D each forward, 10 D more backward.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _attention_case import (
    DTYPES,
    GROUP,
    MASKS,
    PASSES,
    TOKENS,
    Attention,
    Case,
    WrongResult,
    errors,
)
from _measure import CLOCKS, interleave, introduce, matmul, write_report

from usp.attention import block
from usp.backends import native
from usp.ops.merge import merge
from usp.planning.heads import Heads
from usp.planning.problem import Block, Scoring, State
from usp.planning.visit import whole_visit

LENGTHS = (512, 2048, 8192, 16384)


def measure(case: Case, which: str, args: argparse.Namespace) -> dict[str, Any]:
    attention = Attention(case)
    checked = errors(case, attention, which)
    roof = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    product, product_flops = matmul(roof)
    times = interleave(
        {
            "sdpa": lambda: attention.sdpa(which),
            "usp": lambda: attention.usp(which),
            "matmul": product,
        },
        args.rounds,
        args.seconds,
        args.clock,
    )
    flops = case.flops(which)
    return {
        **asdict(case),
        "pass": which,
        "ratio": times.ratio("sdpa", "usp"),
        "of_matmul": times.ratio("matmul", "usp") * flops / product_flops,
        "gflops": {name: flops / times.median(name) / 1e9 for name in ("usp", "sdpa")},
        "matmul_gflops": product_flops / times.median("matmul") / 1e9,
        "matmul_dtype": str(roof),
        "errors_usp_sdpa": checked,
        "seconds": times.seconds,
    }


def measure_ring_step(dtype: str, head_dim: int, args: argparse.Namespace) -> dict[str, Any]:
    """The second half of the keys: into a state that holds the first, and into a new one."""
    length, heads = min(max(args.lengths), 8192), 4
    x = torch.randn(4, 1, length, heads, head_dim).to(DTYPES[dtype])
    q, halves = x[0], [(x[1 + i], x[2 + i]) for i in range(2)]
    visit = whole_visit(length, length)
    blocks = [
        Block(q, k, v, visit, Heads(0, heads, heads, 1), Scoring(head_dim**-0.5)) for k, v in halves
    ]

    def fresh() -> State:
        state = block.new_state(q, head_dim)
        block.attention_forward(blocks[1], state, native)
        return state

    held = block.new_state(q, head_dim)
    block.attention_forward(blocks[0], held, native)
    carried = State(held.out.clone(), held.lse.clone())
    block.attention_forward(blocks[1], carried, native)
    single = fresh()
    merged, lse = merge(held.out, held.lse, single.out, single.lse)
    for one, two in ((carried.out, merged), (carried.lse, lse)):
        if not (one - two).abs().max() <= 1e-2 * two.abs().max():
            sys.exit(f"ring step in {dtype}: the carried state is not the merged one: not timed")
    times = interleave(
        {
            "carried": lambda: block.attention_forward(blocks[1], held, native),
            "fresh": fresh,
        },
        args.rounds,
        args.seconds,
        args.clock,
    )
    return {
        "dtype": dtype,
        "head_dim": head_dim,
        "length": length,
        "heads": heads,
        "carried_over_fresh": times.ratio("carried", "fresh"),
        "seconds": times.seconds,
    }


def cases(args: argparse.Namespace) -> Iterator[Case]:
    grid = itertools.product(args.dtypes, args.head_dims, args.lengths, args.masks)
    for dtype, head_dim, length, mask in grid:
        heads = args.heads or min(max(1, 16384 // length), 8)
        heads = max(heads, GROUP) if mask == "gqa" else heads
        yield Case(dtype, head_dim, length, mask, heads, max(1, TOKENS // length))


def print_row(result: dict[str, Any]) -> None:
    worst = max(ours / max(sdpa, 1e-30) for ours, sdpa in result["errors_usp_sdpa"].values())
    print(
        f"{result['dtype']:5} {result['head_dim']:4} {result['length']:6} {result['mask']:10}"
        f"{result['heads']:3}  {result['pass']:8}{result['ratio']:7.2f}"
        f"{result['gflops']['usp']:9.0f}{result['gflops']['sdpa']:9.0f}"
        f"{result['matmul_gflops']:9.0f}{100 * result['of_matmul']:9.0f} %{worst:9.2f}",
        flush=True,
    )


def print_means(results: list[dict[str, Any]]) -> None:
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for result in results:
        groups[result["dtype"], result["mask"], result["pass"]].append(result["ratio"])
    print("\ngeometric means of time(SDPA) / time(usp)")
    for group, ratios in groups.items():
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        print(f"  {group[0]:5} {group[1]:10} {group[2]:8} {mean:6.2f}  ({len(ratios)} cases)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--head-dims", nargs="+", type=int, default=[64, 80, 128])
    add("--lengths", nargs="+", type=int, default=list(LENGTHS))
    add("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="both: with backward")
    add("--heads", type=int, help="query heads; by default 8 and fewer above 2048 tokens")
    add("--rounds", type=int, default=15, help="of each case, at most")
    add("--seconds", type=float, default=10.0, help="after which a case gets no further round")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--clock", choices=CLOCKS, default="wall", help="cpu: on a busy machine, with --threads 1")
    add("--quick", action="store_true", help="head dim 64, 512 tokens, fp32 and bf16, 5 rounds")
    add("--json", type=Path, help="write every time taken there")
    args = parser.parse_args()
    if args.quick:
        args.dtypes, args.head_dims, args.lengths, args.rounds = ["fp32", "bf16"], [64], [512], 5
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    about = introduce(clock=args.clock)
    print(
        "\ndtype  dim length mask     heads  pass    ratio  usp GF/s SDPA GF/s"
        " mm GF/s of matmul  error/SDPA's"
    )
    results = []
    for case, which in itertools.product(cases(args), args.passes):
        results.append(measure(case, which, args))
        print_row(results[-1])
    print_means(results)
    steps = [
        measure_ring_step(d, n, args) for d, n in itertools.product(args.dtypes, args.head_dims)
    ]
    print("\none ring step into a state that holds as many keys already / into a new one")
    for step in steps:
        print(
            f"  {step['dtype']:5} {step['head_dim']:4} {step['length']:6}"
            f"{step['carried_over_fresh']:7.3f}"
        )
    write_report(args.json, about, cases=results, ring_steps=steps)


if __name__ == "__main__":
    try:
        main()
    except WrongResult as wrong:
        sys.exit(str(wrong))
