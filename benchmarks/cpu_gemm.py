"""The kernels' matrix products against torch's brgemm and the machine's peak, on one tile.

usp bench cpu_gemm
usp bench cpu_gemm --clock cpu --json result.json   (a machine that others use too)

Three products of attention on a tile of 64 queries and 128 keys, by one thread, in turn: scores
(64 x D x 128), weights times V (64 x 128 x D), weights' gradients times Q (128 x 64 x D). Each
library has its operands as its own attention holds them, packed before the clock starts. brgemm
is not public: where the installed torch does not export it, or refuses it on this machine, it is
left out. Nothing is timed whose result is not the plain product.

"ratio" is time(brgemm) / time(usp), above 1 where usp is faster. "of peak" is usp's rate over that
of a loop of independent FMAs, or of BF16 dot products for bf16 where the machine has them, taken in
the same rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _gemm_library import BRGEMM, PRODUCTS, find_brgemm, load_peer, of_torch, of_usp
from torch import Tensor

from usp.bench.device import DTYPES
from usp.bench.machine import introduce
from usp.bench.records import write_report
from usp.bench.timing import CLOCKS, interleave

QUERIES, KEYS = 64, 128
SAMPLE_SECONDS = 2e-3  # a clock and a call from Python cost microseconds


def operands(product: str, dtype: torch.dtype, head_dim: int) -> tuple[Tensor, Tensor]:
    """Of usp: keys and queries; weights (keys, queries) and values; gradients and queries."""
    left = (KEYS, head_dim if product == "scores" else QUERIES)
    right = (KEYS if product == "values" else QUERIES, head_dim)
    return torch.randn(left).to(dtype), torch.randn(right).to(dtype)


def plain_operands(product: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """a (m, k) and b (k, n) of the product as torch's attention writes it."""
    if product == "scores":
        return right, left.mT.contiguous()
    return (left.mT.contiguous() if product == "values" else left), right


def check(name: str, found: Tensor, a: Tensor, b: Tensor) -> None:
    exact = a.double() @ b.double()
    error = ((found.double() - exact).abs().max() / exact.abs().max()).item()
    if not error <= 1e-5:
        sys.exit(f"{name} is off by {error:.1e} of the largest value: not timed")


def enough(run: Callable[[int], object]) -> int:
    """How often to run so that a sample is long enough."""
    repeats = 1
    while True:
        start = time.process_time()
        run(repeats)
        if time.process_time() - start > SAMPLE_SECONDS:
            return repeats
        repeats *= 2


def measure(
    peer: ctypes.CDLL, dtype: str, head_dim: int, product: str, args: argparse.Namespace
) -> dict[str, Any]:
    left, right = operands(product, DTYPES[dtype], head_dim)
    a, b = plain_operands(product, left, right)
    (m, k), n = a.shape, b.shape[1]
    ours, theirs = of_usp(peer, product, left, right), of_torch(peer, a, b, product != "scores")
    if product == "scores":
        check(f"usp's {product}", ours.result(KEYS, QUERIES).mT, a, b)
    else:
        columns = -(-head_dim // 16) * 16  # of its vectors; the rest are zero
        check(f"usp's {product}", ours.result(m, columns)[:, :n], a, b)
    sink = ctypes.c_float()
    bf16 = DTYPES[dtype] == torch.bfloat16
    runs: dict[str, Callable[[int], Any]] = {
        "usp": ours.run,
        "peak": lambda repeats: peer.peak_run(bf16, 1000 * repeats, ctypes.byref(sink)),
    }
    flops = {"usp": 2.0 * m * n * k, "peak": runs["peak"](1)}
    if theirs is not None:
        check(f"torch's {product}", theirs.result(m, n), a, b)
        runs["brgemm"], flops["brgemm"] = theirs.run, flops["usp"]
    if not flops["peak"]:
        del runs["peak"], flops["peak"]
    repeats = {name: enough(run) for name, run in runs.items()}
    candidates = {name: lambda name=name: runs[name](repeats[name]) for name in runs}
    times = interleave(candidates, args.rounds, args.seconds, args.clock)

    def rate(name: str, seconds: float) -> float:
        return repeats[name] * flops[name] / seconds / 1e9

    def faster_than(other: str) -> float | None:
        if other not in runs:
            return None
        work = repeats["usp"] * flops["usp"] / (repeats[other] * flops[other])
        return work * times.ratio(other, "usp")

    return {
        "dtype": dtype,
        "head_dim": head_dim,
        "product": product,
        "ratio": faster_than("brgemm"),
        "of_peak": faster_than("peak"),
        "gflops": {name: rate(name, times.median(name)) for name in runs},
        "seconds": times.seconds,
        "calls_in_a_sample": repeats,
    }


def print_row(result: dict[str, Any]) -> None:
    rates = [f"{result['gflops'].get(name, float('nan')):10.1f}" for name in COLUMNS]
    ratio, of_peak = (result[name] or float("nan") for name in ("ratio", "of_peak"))
    print(
        f"{result['dtype']:6}{result['head_dim']:4}  {result['product']:14}"
        f"{''.join(rates)}{ratio:8.2f}{100 * of_peak:8.0f} %",
        flush=True,
    )


COLUMNS = ("usp", "brgemm", "peak")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    add("--head-dims", nargs="+", type=int, default=[64, 80, 128])
    add("--rounds", type=int, default=51, help="of each product, at most")
    add("--seconds", type=float, default=5.0, help="after which a product gets no further round")
    add("--clock", choices=CLOCKS, default="wall", help="cpu: on a busy machine")
    add("--optimize", default="-O3", help="of the compiler; less is for trying this program out")
    add("--quick", action="store_true", help="head dim 64, 5 rounds")
    add("--json", type=Path, help="write every time taken there")
    args = parser.parse_args()
    if args.quick:
        args.head_dims, args.rounds = [64], 5
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    about = introduce("cpu_gemm", clock=args.clock, optimize=args.optimize)
    peer = load_peer(args.optimize)
    for dtype in args.dtypes:
        if find_brgemm(DTYPES[dtype]) is None:
            print(f"brgemm in {dtype} left out: torch has no {BRGEMM[DTYPES[dtype]]}")
    print("\nGFLOP/s            " + "".join(f"{n:>10}" for n in COLUMNS) + "   ratio   of peak")
    results = []
    for case in itertools.product(args.dtypes, args.head_dims, PRODUCTS):
        results.append(measure(peer, *case, args))
        print_row(results[-1])
    write_report(args.json, about, products=results)


if __name__ == "__main__":
    main()
