"""What a mask costs on the CPU: against its share of all pairs, SDPA's dense mask, FlexAttention.

usp bench cpu_masks --json result.json
python benchmarks/cpu_masks.py --lengths 1024 --rounds 3          (quick)

Candidates run in turn in one process: usp with the mask and with everything seen; both with their
backward; then usp with the mask, SDPA with the boolean matrix and FlexAttention (torch.compile, a
block mask of the same function). These three by themselves: SDPA's scores, 4 bytes a pair, push out
of the caches what the next call reads, which a short call feels and a long one does not. "of its
share" is time(usp, mask) / time(usp, everything) over the share of pairs that the mask opens: 1
where a mask costs just what it opens; of the time in the kernels, and of whole calls: what Python
and torch read for a call is out of the caches behind a kernel's data, and takes tenths of a
millisecond whatever the mask is. The mask's call is repeated until it has seen as many pairs
as everything, so that both take about as long; "alone" is a single call, forward, in its turn with
everything: what a call costs when the caches hold another's data. Nothing is timed whose rows
differ from fp64, of the same inputs, by more than 1e-5 of the largest, in bf16 1e-2. FlexAttention
on CPUs has a forward alone. Where glibc is, freed memory stays with the process: else it is by
chance whether results are fresh pages, and a short call feels it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from usp import long_context_attention, masks
from usp.backends import native
from usp.bench.device import DTYPES
from usp.bench.machine import introduce, keep_freed_memory
from usp.bench.records import write_report
from usp.bench.timing import Times, interleave, take_turns
from usp.masks import Mask

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
KERNELS = (
    "attention_once",
    "attention_once_backward",
    "attention_forward",
    "attention_backward",
    "delta",
)
Run = Callable[[], object]


def all_masks(length: int) -> dict[str, Mask]:
    """By name, for so many tokens; up to four bands, and neighbourhoods of more."""
    bounds = tuple(length * i // 8 for i in range(9))
    side = math.isqrt(length)
    width, grid = min(256, length // 16), (side, length // side)
    windows = {}
    for half in (width, 2 * width):
        window = masks.window(half - 1, half)
        windows |= {
            f"window of {2 * half}": window,
            f"window of {2 * half}, 4 sinks": window | masks.first_keys(4),
            f"window of {2 * half}, 4 registers": window
            | masks.first_keys(4)
            | masks.first_queries(4),
        }
    return {
        "causal": masks.causal(),
        **windows,
        "documents": masks.documents(bounds),
        "shared prefix, causal": masks.shared_prefix(bounds) & masks.causal(),
        "all but a window": ~masks.window(width - 1, width),
        "neighbourhood 13 x 13": masks.neighbourhood(grid, 13),
        "neighbourhood 13 x 13, shifted": masks.neighbourhood(grid, 13, edges="shift"),
    }


def flex_attention_of(dense: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Run:
    """A compiled FlexAttention of a boolean mask; heads before tokens."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = len(dense)
    block_mask = create_block_mask(
        lambda b, h, i, j: dense[i, j], None, None, length, length, device="cpu"
    )
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=block_mask)


def measure(
    name: str, mask: Mask, length: int, dtype: str, args: argparse.Namespace
) -> dict[str, Any]:
    torch.manual_seed(0)
    shape = (1, length, args.heads, args.head_dim)
    q, k, v, dout = (torch.randn(shape).to(DTYPES[dtype]) for _ in range(4))
    dense = mask.dense(length, length)
    share = float(dense.double().mean())
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def usp(given: Mask) -> Tensor:
        out = long_context_attention(q, k, v, mask=given)
        assert isinstance(out, Tensor)
        return out

    def both(given: Mask) -> object:
        out = long_context_attention(*leaves, mask=given)
        assert isinstance(out, Tensor)
        return torch.autograd.grad(out, leaves, dout)

    check(name, usp(mask), q, k, v, dense)
    repeats = max(1, round(1 / share))
    pairs: list[dict[str, Run]] = [
        {"usp": repeated(repeats, usp, mask), "everything": repeated(1, usp, masks.everything())},
        {
            "both": repeated(repeats, both, mask),
            "everything, both": repeated(1, both, masks.everything()),
        },
        {"usp alone": repeated(1, usp, mask), "everything": repeated(1, usp, masks.everything())},
    ]
    candidates: dict[str, Run] = {
        "usp beside peers": lambda: usp(mask),
        "sdpa": lambda: F.scaled_dot_product_attention(*heads_first, attn_mask=dense),
    }
    reasons = {}
    if args.flex:
        try:
            flex = flex_attention_of(dense, *heads_first)
            check("FlexAttention", flex().transpose(1, 2), q, k, v, dense)  # type: ignore[attr-defined]
            candidates["flex"] = flex
        except Exception as error:  # a peer that does not run here is no result
            reasons["flex"] = f"{type(error).__name__}: {error}"[:200]
    (forward, in_forward), (backward, in_backward), (alone, _) = (
        calls_and_kernels(pair, args.rounds, args.seconds) for pair in pairs
    )
    times = interleave(candidates, args.rounds, args.seconds)
    peers = [peer for peer in ("sdpa", "flex") if peer in candidates]
    return {
        "mask": name,
        "length": length,
        "dtype": dtype,
        "bands": len(mask.bands(torch.arange(length), length).first),
        "share_of_pairs": share,
        "repeats": repeats,
        "of_its_share": forward.ratio("usp", "everything") / share / repeats,
        "of_its_share_both": backward.ratio("both", "everything, both") / share / repeats,
        "of_its_share_in_kernels": in_forward.ratio("usp", "everything") / share / repeats,
        "of_its_share_in_kernels_both": in_backward.ratio("both", "everything, both")
        / share
        / repeats,
        "of_its_share_alone": alone.ratio("usp alone", "everything") / share,
        "ratios": {peer: times.ratio(peer, "usp beside peers") for peer in peers},
        "not_measured": reasons,
        "seconds": {
            **forward.seconds,
            **backward.seconds,
            "usp alone": alone.seconds["usp alone"],
            "everything beside it": alone.seconds["everything"],
            **times.seconds,
        },
        "seconds_in_kernels": {**in_forward.seconds, **in_backward.seconds},
    }


def repeated(times: int, run: Callable[[Mask], object], mask: Mask) -> Run:
    def call() -> None:
        for _ in range(times):
            run(mask)

    return call


def calls_and_kernels(
    candidates: dict[str, Run], rounds: int, budget: float
) -> tuple[Times, Times]:
    """``interleave``, and the seconds of the same calls in kernels."""
    spent: dict[Run, list[float]] = {run: [] for run in candidates.values()}

    def seconds(run: Run) -> float:
        with kernels_timed() as taken:
            start = time.perf_counter()
            run()
            whole = time.perf_counter() - start
        if not taken:
            sys.exit("a call went past usp's own kernels: not timed")
        spent[run].append(sum(taken))
        return whole

    calls = take_turns(candidates, rounds, budget, seconds)
    return calls, Times({name: spent[run] for name, run in candidates.items()})


@contextmanager
def kernels_timed() -> Iterator[list[float]]:
    """The seconds of each call of an op of the native backend, as they come."""
    taken: list[float] = []

    def timed(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            start = time.perf_counter()
            found = kernel(*given)
            taken.append(time.perf_counter() - start)
            return found

        return call

    with ExitStack() as stack:
        for name in KERNELS:
            stack.enter_context(mock.patch.object(native, name, timed(getattr(native, name))))
        yield taken


def check(name: str, out: Tensor, q: Tensor, k: Tensor, v: Tensor, dense: Tensor) -> None:
    """End the program where sampled rows differ from fp64."""
    inside = torch.randperm(q.shape[1], generator=torch.Generator().manual_seed(1))[:64]
    at = torch.cat([inside, torch.tensor([0, q.shape[1] - 1])]).unique()
    scores = torch.einsum("bihd,bjhd->bhij", q[:, at].double(), k.double()) * q.shape[3] ** -0.5
    weights = scores.masked_fill(~dense[at], -torch.inf).softmax(-1).nan_to_num()
    exact = torch.einsum("bhij,bjhd->bihd", weights, v.double())
    error = float((out[:, at] - exact).abs().max() / exact.abs().max())
    if not error <= (allowed := TOLERANCE[q.dtype]):
        sys.exit(f"{name}: error {error:.1e}, allowed {allowed:.0e}: not timed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--lengths", nargs="+", type=int, default=[8192])
    add("--heads", type=int, default=2)
    add("--head-dim", type=int, default=64)
    add("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    add("--masks", nargs="+", help="by name; default: all")
    add("--rounds", type=int, default=9)
    add("--seconds", type=float, default=20.0, help="after which a mask gets no further round")
    add("--no-flex", dest="flex", action="store_false", help="without FlexAttention")
    add("--json", type=Path, help="write every time taken there")
    args = parser.parse_args()
    known = {name: None for length in args.lengths for name in all_masks(length)}
    if unknown := [name for name in args.masks or () if name not in known]:
        parser.error(
            f"no mask {unknown[0]!r} at {args.lengths} tokens: there are {', '.join(known)}"
        )
    about = introduce("cpu_masks", freed_memory_kept=keep_freed_memory())
    print(
        "\nmask",
        " " * 27,
        "length dtype bands  share  of its share in kernels: forward, both;",
        "calls: forward, both, alone   over:",
    )
    results = []
    for length, dtype in itertools.product(args.lengths, args.dtypes):
        for name, mask in all_masks(length).items():
            if args.masks is not None and name not in args.masks:
                continue
            found = measure(name, mask, length, dtype, args)
            over = "  ".join(f"{peer} {ratio:.2f}" for peer, ratio in found["ratios"].items())
            print(
                f"{name:31} {length:6} {dtype:5} {found['bands']:5} "
                f"{100 * found['share_of_pairs']:5.1f} % {found['of_its_share_in_kernels']:24.2f} "
                f"{found['of_its_share_in_kernels_both']:12.2f} {found['of_its_share']:14.2f} "
                f"{found['of_its_share_both']:7.2f} {found['of_its_share_alone']:7.2f}      {over}",
                flush=True,
            )
            results.append(found)
    write_report(args.json, about, masks=results)


if __name__ == "__main__":
    main()
